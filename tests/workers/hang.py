"""Rank 1 never joins the last collective; rank 0 waits for it past its deadline."""

import sys
import time

import torch
import torch.distributed as dist

from r1kern import distributed
from r1kern.watch import deadline

world = distributed.start(record_folder=sys.argv[1])
dist.all_reduce(torch.ones(3))
with deadline("the phase that hangs", 3.0 + 3.0 * world.rank):
    if world.rank == 1:
        time.sleep(60)
    dist.all_reduce(torch.ones(5))
