"""No process outlives the one whose `launch` started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
LAUNCHER = "R1KERN_LAUNCHER"  # process that the others must not outlive


def end_with_launcher() -> None:
    """Have the kernel end this process when the one whose `launch` started it is gone.

    A killed launcher would else leave its processes at work in a folder that its next start takes
    up. Nothing happens in processes that something else started.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux" or "RANK" not in os.environ:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(launcher):  # it went before the call
        os._exit(128 + signal.SIGKILL)
