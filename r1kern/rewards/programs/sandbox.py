"""Runs one program that nobody has read: in bubblewrap, or with this user's rights if told so.

What a sandboxed program sees: a read-only /usr with the interpreter, /box with the files it was
given, an empty /tmp of `TMP_MB`, null, zero and random devices, no /proc. It has no network, no
capabilities, no environment of ours, and a process namespace of its own that dies with it. It may
start threads but no processes (`seccomp`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1kern.errors import UserError
from r1kern.rewards.programs import seccomp

BOX = "/box"  # folder of the files given to a program
START_S = 60.0  # a sandbox starts in 0.02 s on an idle machine
END_S = 60.0  # the kernel ends a killed program at once, unless its disk hangs
TMP_MB = 64
FILE_MB = 64  # the largest file, standard output and error included
STACK_MB = 64  # recursion that passes through C; also reserved by each thread
OPEN_FILES = 256
ERROR_CHARS = 4_000

PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
# -P -s -S: no folder, no installed package is importable but the standard library.
PYTHON_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
REMEDY = (
    "install it with `apt install bubblewrap` and allow user namespaces (in a container: "
    "--security-opt seccomp=unconfined), or set sandbox.unsafe_local: true"
)


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        memory_mb: address space of a process, MiB.
        cpu_s: processor time of a process, seconds; the caller's deadline comes before it.
        may_fork: it may start processes (a compiler).
        unsafe_local: no sandbox but resource limits.
        site_packages: our installed Python packages are importable.
    """

    memory_mb: int
    cpu_s: float
    may_fork: bool = False
    unsafe_local: bool = False
    site_packages: bool = False

    def command(self) -> list[str]:
        """prlimit, which sets the limits and becomes the program."""
        memory = self.memory_mb << 20
        sizes = {"as": memory, "stack": min(STACK_MB << 20, memory // 4), "core": 0}
        counts = {"cpu": int(self.cpu_s) + 5, "fsize": FILE_MB << 20, "nofile": OPEN_FILES}
        limits = {**sizes, **counts}
        return ["prlimit", *(f"--{name}={value}:{value}" for name, value in limits.items()), "--"]


class Sandboxed:
    """A program that has been started; a context manager that ends it.

    Args:
        argv: the command; parts below `BOX` name `files`.
        files: content of what lies in `BOX`, by file name.
        limits: what it may use.
        stdin: all of its standard input.
        fds: descriptors that it inherits, under their numbers; the caller closes its own copies.
        env: environment variables, besides a plain PATH and locale.

    Raises:
        UserError: there is no sandbox on this machine, with the remedy.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        files: Mapping[str, bytes],
        limits: Limits,
        stdin: bytes = b"",
        fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ):
        self._limits = limits
        self._open = contextlib.ExitStack()  # what stays open as long as this object
        self._exit_code: int | None = None
        self._status = b""  # bubblewrap's account
        self._child: int | None = None  # pidfd of the first process of the namespace
        environment = {**ENVIRONMENT, **(env or {})}
        try:
            self._start(list(argv), files, stdin, list(fds), environment)
        except BaseException:
            self._open.close()
            raise

    def _start(self, argv, files, stdin, fds, environment) -> None:
        self._out, self._err = self._keep(memory_file(b"")), self._keep(memory_file(b""))
        with contextlib.ExitStack() as until_started:
            given = memory_file(stdin)
            until_started.callback(os.close, given)
            start = self._local if self._limits.unsafe_local else self._bubblewrap
            command, folder = start(argv, files, fds, environment, until_started)
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=given,
                    stdout=self._out,
                    stderr=self._err,
                    cwd=folder,
                    env=environment,
                    pass_fds=fds,
                    start_new_session=True,  # Ctrl-C is for us, who end it
                )
            except FileNotFoundError as error:
                raise UserError(f"{error.filename}: not found; `apt install util-linux`") from None
        self._pidfd = self._keep(os.pidfd_open(self._process.pid))
        if not self._limits.unsafe_local:
            self._await_child()

    def __enter__(self) -> Sandboxed:
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self._open.close()

    def wait(self, seconds: float) -> bool:
        """Whether the program ended within `seconds`."""
        return bool(poll([self._pidfd], seconds))

    def kill(self) -> None:
        """Ends it with all its processes; returns when they are gone."""
        if self._exit_code is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # nothing is left
            if self._limits.unsafe_local:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self._child, signal.SIGKILL)
        self._exit_code = self._await_exit()
        # bubblewrap ends with the program; the namespace is empty when its first process has gone.
        if self._child is not None and not poll([self._child], END_S):
            raise TimeoutError(f"a sandbox has not ended within {END_S:.0f} s")

    def exit_code(self) -> int:
        """As a shell gives it, 128 plus the signal that ended it; `kill` came before.

        Raises:
            UserError: the sandbox failed before the program began.
        """
        code = self._exit_code
        assert code is not None, "the program still runs"
        if self._limits.unsafe_local:
            return 128 - code if code < 0 else code
        self._status += b"".join(iter(lambda: os.read(self._status_pipe, 65536), b""))
        if b'"exit-code"' not in self._status:
            raise UserError(f"the sandbox failed ({self.errors().strip()[-300:]}): {REMEDY}")
        return code

    def output(self, most: int = FILE_MB << 20) -> bytes | None:
        """Its standard output so far; None where it is longer than `most` bytes."""
        size = os.fstat(self._out).st_size
        return None if size > most else os.pread(self._out, size, 0)

    def errors(self) -> str:
        """The end of its standard error so far."""
        start = max(0, os.fstat(self._err).st_size - ERROR_CHARS)
        return os.pread(self._err, ERROR_CHARS, start).decode(errors="replace")

    def _keep(self, fd: int) -> int:
        self._open.callback(os.close, fd)
        return fd

    def _local(self, argv, files, fds, environment, until_started):
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="r1kern-"))
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
            Path(folder, name).chmod(0o500)
        argv = [folder + part.removeprefix(BOX) if part.startswith(BOX) else part for part in argv]
        environment |= {"HOME": folder, "TMPDIR": folder}
        return [*self._limits.command(), *argv], folder

    def _bubblewrap(self, argv, files, fds, environment, until_started):
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise UserError(f"bubblewrap, in which programs are tested, is missing: {REMEDY}")

        def passed(fd: int) -> str:
            until_started.callback(os.close, fd)
            fds.append(fd)
            return str(fd)

        status, status_writer = os.pipe()
        self._status_pipe = self._keep(status)
        rules = memory_file(seccomp.program(may_fork=self._limits.may_fork))
        command = [bwrap, *_view(self._limits.site_packages), "--perms", "0755", "--dir", BOX]
        for name, content in files.items():
            copy = passed(memory_file(content))
            command += ["--perms", "0555", "--ro-bind-data", copy, f"{BOX}/{name}"]
        command += ["--remount-ro", "/", "--chdir", "/tmp"]
        command += ["--json-status-fd", passed(status_writer), "--seccomp", passed(rules)]
        return [*command, "--", *self._limits.command(), *argv], "/"

    def _await_child(self) -> None:
        """Learns which process to end; bubblewrap that fails later is told by `exit_code`."""
        deadline = time.monotonic() + START_S
        while b"\n" not in self._status:
            chunk = b""
            if poll([self._status_pipe], deadline - time.monotonic()):
                chunk = os.read(self._status_pipe, 65536)
            if not chunk:
                self._process.kill()
                self._await_exit()
                reason = self.errors().strip()[-300:] or f"no start within {START_S:.0f} s"
                raise UserError(f"the sandbox does not start ({reason}): {REMEDY}")
            self._status += chunk
        pid = json.loads(self._status.splitlines()[0])["child-pid"]
        with contextlib.suppress(ProcessLookupError):  # it has ended
            self._child = self._keep(os.pidfd_open(pid))
        # The number is surely its own only while bubblewrap lives.
        if self._child is None or self.wait(0):
            self._child = self._pidfd

    def _await_exit(self) -> int:
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"a killed program has not ended within {END_S:.0f} s") from None


def poll(fds: Sequence[int], seconds: float) -> list[int]:
    """The descriptors that can be read (or whose process has ended), once any or in time none."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(max(0.0, seconds) * 1000)]


def memory_file(content: bytes) -> int:
    """A file in memory that holds `content`, sealed where there is any; the caller closes it."""
    fd = os.memfd_create("r1kern", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    if content:
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _view(site_packages: bool) -> list[str]:
    """What of this machine the program sees, as bubblewrap's options."""
    options = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    options += ["--hostname", "sandbox", "--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    options += ["--size", str(TMP_MB << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    options += ["--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):  # compiler links, library places
        options += ["--ro-bind-try", path, path]
    prefix = Path(PYTHON).parent.parent
    library = prefix / "lib"
    if not prefix.is_relative_to("/usr"):
        options += ["--ro-bind", PYTHON, PYTHON, "--ro-bind", str(library), str(library)]
    if site_packages:
        for path in packages():
            options += ["--ro-bind", path, path]
    for device in ("null", "zero", "full", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return options


def packages() -> list[str]:
    """The folders of our installed packages."""
    return [path for path in map(os.path.realpath, sys.path) if path.endswith("-packages")]
