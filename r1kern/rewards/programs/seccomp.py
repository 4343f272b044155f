"""The system calls that a program under test may not make, as a classic BPF program for bubblewrap.

Namespaces hide the machine; this filter closes what they leave open: new processes (the kernel does
not hold root to RLIMIT_NPROC), memory that RLIMIT_AS does not see, and rarely used entrances to the
kernel that no solution of a programming task needs.
"""

from __future__ import annotations

import errno
import platform
import struct

from r1kern.errors import UserError

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NEW_PROCESS = {"x86_64": (57, 58), "aarch64": ()}  # fork, vfork
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
CLONE_THREAD = 0x10000
X32_BIT = 0x40000000  # a second numbering of the calls on x86-64

# name: (x86-64, aarch64), None where the call does not exist
DENIED = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),  # its contexts are counted for the whole machine
    "add_key": (248, 217),  # keyrings outlive the sandbox
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),  # memory outside RLIMIT_AS
    "memfd_secret": (447, 447),
    "shmget": (29, 194),  # memory outside RLIMIT_AS
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "socket": (41, 198),
    "inotify_init": (253, None),  # counted for the user, whoever else runs as it
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "syslog": (103, 116),
    "personality": (135, 92),
    "modify_ldt": (154, None),
}

# Classic BPF: (code, jump if true, jump if false, operand); a jump skips that many instructions.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def program(*, may_fork: bool) -> bytes:
    """The filter as bubblewrap's --seccomp reads it: an array of struct sock_filter.

    Args:
        may_fork: new processes are allowed (a compiler starts some); else only threads are.

    Raises:
        UserError: the numbers of this machine's system calls are not known here.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        raise UserError(
            f"no system-call filter for {machine}: test programs on x86-64 or aarch64, or set "
            "sandbox.unsafe_local: true"
        )
    column = list(AUDIT_ARCH).index(machine)
    denied = [numbers[column] for numbers in DENIED.values() if numbers[column] is not None]
    lines = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, X32_BIT),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    if not may_fork:
        denied += NEW_PROCESS[machine]
        lines += _when(CLONE3, errno.ENOSYS)  # the C library then uses clone, whose flags we see
        lines += [
            (_EQUAL, 0, 4, CLONE[machine]),
            (_LOAD, 0, 0, _FIRST_ARGUMENT),
            (_ANY_BIT, 1, 0, CLONE_THREAD),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    for number in denied:
        lines += _when(number, errno.EPERM)
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _when(number: int, error: int) -> list[tuple[int, int, int, int]]:
    return [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
