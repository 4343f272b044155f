"""Worker: start-up and watch of ranks that train nothing.

torchrun watch.py differ          rank 1 has other options than rank 0
torchrun watch.py stop RANK       that rank is stopped (SIGSTOP), as on a machine that has gone
torchrun watch.py late            rank 1 does not come to a collective in time
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from r1kern import cli, distributed, watch
from r1kern.config import TrainConfig
from r1kern.report.ledger import Ledger


def main(what: str, victim: int = 0) -> None:
    rank = int(os.environ["RANK"])
    lr = 2e-6 if what == "differ" and rank == 1 else 1e-6
    config = TrainConfig(model={"path": "m"}, data={"train": "d"}, optim={"lr": lr})
    distributed.PATIENCE_S = 3.0
    distributed.start(config=config.model_dump(mode="json"))
    with Ledger(4.0 if what == "late" else 60.0)("update"):
        watch.at("layer 7")
        if what == "stop" and rank == victim:
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "stop":
            time.sleep(30)
        if rank != 1:
            dist.all_reduce(torch.zeros(1))
        time.sleep(30)


if __name__ == "__main__":
    code = cli.guarded(lambda: main(sys.argv[1], *map(int, sys.argv[2:])))
    sys.stderr.flush()
    os._exit(code)
