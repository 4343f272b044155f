"""What pyproject.toml cannot say: where `kernels/` and `configs/` install; the C++ extension."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

extension = Pybind11Extension(
    "r1kern._C",
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
)

setup(
    packages=[*find_packages(include=["r1kern", "r1kern.*"]), "r1kern.kernels", "r1kern.configs"],
    package_dir={"r1kern.kernels": "kernels", "r1kern.configs": "configs"},
    package_data={
        "r1kern": ["py.typed", "*.pyi"],
        "r1kern.data": ["files/*"],
        "r1kern.configs": ["*.yaml"],
    },
    include_package_data=False,
    ext_modules=[extension],
)
