"""Worker: start-up and watch of ranks that train nothing.

torchrun watch.py stop RANK       that rank is stopped (SIGSTOP), as on a machine that has gone
torchrun watch.py late            rank 1 does not come to a collective in time
torchrun watch.py kill FILE       rank 1 writes the time into FILE and is killed
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from r1kern import cli, distributed, watch
from r1kern.report.ledger import Ledger


def main(what: str, argument: str = "") -> None:
    rank = int(os.environ["RANK"])
    distributed.PATIENCE_S = 3.0
    distributed.start()
    with Ledger(4.0 if what == "late" else 60.0)("update"):
        watch.at("layer 7")
        if what == "stop" and rank == int(argument):
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "stop":
            time.sleep(30)
        if what == "kill" and rank == 1:
            Path(argument).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if rank != 1:
            dist.all_reduce(torch.zeros(1))
        time.sleep(30)


if __name__ == "__main__":
    code = cli.guarded(lambda: main(*sys.argv[1:]))
    sys.stderr.flush()
    os._exit(code)
