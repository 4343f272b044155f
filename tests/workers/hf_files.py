"""Worker: imports a published FP8 miniature and exports it again, under each of several layouts.

    torchrun hf_files.py FOLDER TRUTH.safetensors OUT TP,EP,PP ...

Every rank compares its parameters with slices of the truth, and what it exports with all of it;
writes OUT/LAYOUT_bf16 and OUT/LAYOUT_fp8.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from r1kern import distributed


def main(folder: str, truth: str, out: str, layouts: list[str]) -> None:
    expected = load_file(truth)
    for layout in layouts:
        tp, ep, pp = map(int, layout.split(","))
        world = distributed.start(tp=tp, ep=ep, pp=pp)
        check(world, folder, expected, Path(out), layout)
        dist.barrier()
    distributed.shutdown()


def check(world, folder: str, expected: dict, out: Path, layout: str) -> None:
    from megatron.core import parallel_state as mpu

    from r1kern.config import Model, Optim, Parallel
    from r1kern.model.local import local_tensors
    from r1kern.train.policy import Policy

    parallel = Parallel(tp=world.tp, ep=world.ep, pp=world.pp)
    policy = Policy(Model(path=folder), parallel, Optim(), world, total_updates=1)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    for megatron_name, tensor, slot in local_tensors(policy.model):
        parts = [expected[name] for name in slot.names]
        if slot.split is not None:
            parts = [part.chunk(world.tp, dim=slot.split)[tp_rank] for part in parts]
        assert tensor.dtype == parts[0].dtype, megatron_name
        assert torch.equal(tensor, torch.cat(parts)), f"{layout} rank {world.rank} {megatron_name}"
    exported = 0
    for name, tensor in policy.export():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        exported += 1
    assert exported > 40
    for dtype in ("bf16", "fp8"):
        policy.save_hf(out / f"{layout}_{dtype}", dtype)


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
