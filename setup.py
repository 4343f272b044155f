"""What pyproject.toml cannot say: where the top-level folders install; the C++ extensions."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

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

CUDA = (12, 8)
"""The oldest nvcc that `csrc/hopper` is built with."""

# Optional: where nvcc fails, setuptools says so and goes on without it.
hopper = Pybind11Extension(
    "r1kern._hopper",
    sources=sorted(str(path) for path in Path("csrc/hopper").glob("*.c*") if path.suffix != ".cuh"),
    depends=sorted(str(path) for path in Path("csrc/hopper").glob("*.*h")),
    optional=True,
)


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME, else the one on PATH, if it is new enough."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if found is None:
        return None
    told = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    return Path(found) if release and tuple(map(int, release.groups())) >= CUDA else None


class Build(build_ext):
    """Leaves the CUDA extension to nvcc, and out where there is none."""

    def finalize_options(self):
        super().finalize_options()
        self.nvcc = find_nvcc()
        if self.nvcc is None:
            self.extensions = [x for x in self.extensions if x.name != hopper.name]

    def run(self):
        if self.nvcc is None:
            print(
                "r1kern._hopper (FP8 on Hopper GPUs) is left out: no nvcc of CUDA "
                f"{CUDA[0]}.{CUDA[1]} or newer in CUDA_HOME or on PATH"
            )
        super().run()

    def build_extension(self, ext):
        if ext.name != hopper.name:
            return super().build_extension(ext)
        built = Path(self.get_ext_fullpath(ext.name))
        if not (self.force or newer_group(["setup.py", *ext.sources, *ext.depends], built)):
            return None
        built.parent.mkdir(parents=True, exist_ok=True)
        command = [self.nvcc, "-shared", "-o", built, "-std=c++17", "-O1"]  # -O1 for the host only
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
        # wgmma and setmaxnreg are of sm_90a alone.  The wheels of CUDA keep libraries in `lib`.
        command += ["-gencode=arch=compute_90a,code=sm_90a", f"-L{self.nvcc.parent.parent / 'lib'}"]
        command += [f"-I{folder}" for folder in [*ext.include_dirs, *self.include_dirs]]
        done = subprocess.run([*map(str, command), *ext.sources], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"nvcc cannot build {ext.name}:\n{done.stdout}{done.stderr}")
        return None


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
    ext_modules=[extension, hopper],
    cmdclass={"build_ext": Build},
)
