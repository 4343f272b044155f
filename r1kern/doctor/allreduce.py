"""Worker of the doctor's all-reduce, under torchrun: sums ones, checks the sum, times it."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

REPEATS = 5
TIMEOUT_S = 60


def main(mib: int) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    data = torch.ones(mib * 2**18, device=device)

    def synchronize():
        if cuda:
            torch.cuda.synchronize(device)

    size = dist.get_world_size()
    dist.all_reduce(data)
    if not bool((data == size).all()):
        raise RuntimeError(f"the sum over {size} processes is wrong")
    synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(data)
    synchronize()
    seconds = (time.perf_counter() - began) / REPEATS
    if dist.get_rank() == 0:
        # What each process has to send: NCCL's "bus bandwidth".
        sent = 2 * (size - 1) / size * data.nbytes
        print(f"{dist.get_backend()}, {mib} MiB at {sent / seconds / 1e9:.1f} GB/s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
