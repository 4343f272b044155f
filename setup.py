"""What pyproject.toml cannot say: where the top-level folders install; the C++ extension."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

# Elsewhere the pragmas are ignored: the same results on one thread.
openmp = ["-fopenmp"] if sys.platform == "linux" else []
# No code here reads errno or floating-point flags; a loop that must keep them is not vectorised.
vectorise = ["-fno-math-errno", "-fno-trapping-math"]
extension = Pybind11Extension(
    "r1kern._C",
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    cxx_std=17,
    extra_link_args=openmp,
    extra_compile_args=["-O3", *vectorise, *openmp, "-Wall", "-Wextra"],
)

folders = {f"r1kern.{name}": name for name in ("kernels", "benchmarks", "configs")}

setup(
    packages=[*find_packages(include=["r1kern", "r1kern.*"]), *folders],
    package_dir=folders,
    package_data={
        "r1kern": ["py.typed", "*.pyi"],
        "r1kern.data": ["files/*"],
        "r1kern.report.page": ["*.css", "*.js"],
        "r1kern.configs": ["*.yaml", "distil/*.yaml", "models/*/config.json"],
    },
    include_package_data=False,
    ext_modules=[extension],
)
