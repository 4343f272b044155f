"""Set-up by `make`: what it says when it cannot install, what it does with a `.venv` it finds."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SET_UP = ["Makefile", "requirements-cpu.lock", "pyproject.toml", "setup.py", ".ci", "csrc"]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, without a `.venv`."""
    for name in SET_UP:
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "r1kern").mkdir()
    return tmp_path


@pytest.fixture
def bootstrap(checkout):
    """The set-up program of `checkout`, as a module."""
    spec = importlib.util.spec_from_file_location("bootstrap", checkout / ".ci" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(checkout, *arguments, **environment):
    """Runs `make venv` without a terminal or input; returns its last line before make's own."""
    result = subprocess.run(
        ["make", "venv", *arguments],
        cwd=checkout,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0, result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("set-up failed: ")]
    return line


def test_no_python(checkout):
    line = make(checkout, "PYTHON=/nonexistent/python")
    assert "no Python 3.11, 3.12 or 3.13 found as /nonexistent/python" in line
    assert "apt install" in line


def test_no_compiler(checkout):
    line = make(checkout, CXX="/nonexistent/g++")
    assert "no C++ compiler (/nonexistent/g++)" in line
    assert "apt install g++" in line
    assert not (checkout / ".venv").exists()


def test_no_package_index_then_a_half_made_venv(checkout, bootstrap):
    line = make(
        checkout,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_FIND_LINKS="",
        PIP_RETRIES="0",
    )
    assert "the package index cannot be reached" in line
    assert "PIP_INDEX_URL" in line
    assert (checkout / ".venv" / "bin" / "python").exists()
    assert bootstrap.outstanding() == "everything"
    bootstrap.clear()
    assert not (checkout / ".venv").exists()


def test_a_foreign_venv_is_moved_aside_not_deleted(checkout, bootstrap):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    bootstrap.clear()
    (aside,) = checkout.glob(".venv.old-*")
    assert (aside / "mine").exists()
    assert not (checkout / ".venv").exists()


def test_two_setups_at_once_are_refused(checkout, bootstrap):
    with bootstrap.only_one():
        assert "another set-up of this checkout is running" in make(checkout)


def finished(bootstrap, checkout):
    """Lays out a `.venv` as a finished set-up leaves it, with empty packages."""
    bootstrap.run(["python3", "-m", "venv", "--without-pip", bootstrap.VENV], "venv")
    (site,) = (checkout / ".venv" / "lib").glob("python*/site-packages")
    for name, version in bootstrap.pins().items():
        (site / f"{name.replace('-', '_')}-{version}.dist-info").mkdir()
    (checkout / ".venv" / "bin" / "r1kern").touch()
    (checkout / "r1kern" / "_C.abi.so").touch()
    bootstrap.STAMP.write_text(json.dumps(bootstrap.fingerprint()))
    return site


def test_what_is_outstanding(checkout, bootstrap):
    assert bootstrap.outstanding() == "everything"
    site = finished(bootstrap, checkout)
    assert bootstrap.outstanding() == ""

    source = checkout / "csrc" / "packing.cpp"
    original = source.read_text()
    source.write_text(original + "// changed\n")
    assert bootstrap.outstanding() == "project"
    source.write_text(original)
    assert bootstrap.outstanding() == ""

    (checkout / "r1kern" / "_C.abi.so").unlink()
    assert bootstrap.outstanding() == "project"

    (removed,) = site.glob("numpy-*.dist-info")
    removed.rmdir()
    assert bootstrap.outstanding() == "everything"
    removed.mkdir()
    assert bootstrap.outstanding() == "project"
    lock = bootstrap.LOCK.read_text()
    bootstrap.LOCK.write_text(lock + "added==1.0\n")
    assert bootstrap.outstanding() == "everything"
    bootstrap.LOCK.write_text(re.sub(r"^tqdm==.*\n", "", lock, flags=re.MULTILINE))
    assert bootstrap.outstanding() == "everything"


def test_a_venv_whose_python_is_gone_is_made_anew(checkout, bootstrap):
    finished(bootstrap, checkout)
    bootstrap.PYTHON.unlink()
    assert bootstrap.outstanding() == "everything"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: NameResolutionError\nERROR: No matching distribution found for x==1", "network"),
        ("ERROR: No matching distribution found for x==1", "does not offer x==1"),
        ("error: command '/usr/bin/g++' failed with exit code 1", "does not compile"),
        ("something else", "last lines are above"),
    ],
)
def test_diagnosis_of_a_pip_failure(bootstrap, output, words):
    assert words in bootstrap.diagnosis(output)
