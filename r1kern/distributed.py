"""Start-up of one `torchrun` process: world, device, process groups, seeds, agreement."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from r1kern import nccl
from r1kern.agreement import agree, shared_store
from r1kern.errors import UserError
from r1kern.watch import Heartbeat

# Without a sign of life from a rank; reading a large tensor from a slow disk holds Python up.
PATIENCE_S = 60.0

_heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        rank, size: of the whole job.
        device: "cpu" or "cuda:N".
        tp, ep, pp, dp: sizes of the trainer's parallel groups.
        dp_rank: rank among the data-parallel replicas of the trainer.
        is_last_stage: this process holds the language-model head.
    """

    rank: int
    size: int
    device: torch.device
    tp: int
    ep: int
    pp: int
    dp: int
    dp_rank: int
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(
    *,
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    seed: int = 0,
    deadline_s: float = 600.0,
    record_folder: str | Path | None = None,
    config: dict | None = None,
) -> World:
    """Join the torchrun world (or a world of one) and build Megatron's process groups.

    NCCL and the local GPU are used where CUDA is available, gloo and the CPU elsewhere.  Must run
    before the generator is built: vLLM would otherwise take the default process group over.

    Args:
        tp, ep, pp: tensor, expert and pipeline parallel sizes of the trainer; the data-parallel
            size is what remains of the world.
        seed: seeds python, numpy and torch, and Megatron's model-parallel generators.
        deadline_s: seconds after which any collective fails instead of waiting on.
        record_folder: where a hang leaves the last collectives of each rank.
        config: JSON values that every rank must have alike.

    Raises:
        UserError: the layout does not divide the world size, a local rank has no GPU,
            `record_folder` cannot be made, or `config` differs between ranks.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size % (tp * pp) or size % (ep * pp):
        raise UserError(
            f"{size} processes cannot be laid out as tp={tp} ep={ep} pp={pp}: the world size must "
            f"be a multiple of tp*pp={tp * pp} and of ep*pp={ep * pp}; change parallel.* or "
            f"--nproc-per-node"
        )
    nccl.set_environment(tp=tp, record_folder=record_folder)
    device = _choose_device(local_rank, local_size)
    if not dist.is_initialized():
        # Bound to its GPU, NCCL connects at once (a broken network shows here, not at some later
        # collective) and takes the groups made later as splits of this one.
        bound = {"device_id": device} if device.type == "cuda" else {}
        if record_folder is not None and device.type == "cuda":
            _make_record_folder(Path(record_folder))
        timeout = timedelta(seconds=deadline_s)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_meet(timeout) if "RANK" in os.environ else dist.HashStore(),
            rank=rank,
            world_size=size,
            timeout=timeout,
            **bound,
        )
        _watch_each_other(rank, size, deadline_s)
    if config is not None:
        agree("the options", config, deadline_s=deadline_s)
    _build_groups(tp, ep, pp, deadline_s)
    seed_all(seed)
    from megatron.core import parallel_state as mpu

    return World(
        rank=rank,
        size=size,
        device=device,
        tp=tp,
        ep=ep,
        pp=pp,
        dp=mpu.get_data_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        is_last_stage=mpu.is_pipeline_last_stage(),
    )


def _choose_device(local_rank: int, local_size: int) -> torch.device:
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU ({torch.cuda.device_count()} visible): lower "
                f"--nproc-per-node or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    from r1kern import megatron_cpu

    megatron_cpu.install()
    # Ranks of one node share its cores; vLLM makes later calls a no-op, so it is set here.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.device("cpu")


def _make_record_folder(folder: Path) -> None:
    """NCCL's watchdog writes into it and does not make it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the run folder cannot be written ({error}): set run.folder to another"
        ) from error


def _build_groups(tp: int, ep: int, pp: int, deadline_s: float) -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if mpu.is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, math.ceil(deadline_s / 60)),
    )
    model_parallel_cuda_manual_seed(1)


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch alike on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _meet(timeout: timedelta) -> dist.Store:
    """The store through which the processes of this start of the job find each other.

    torchrun keeps its own store over a restart, where the keys of the start before mislead gloo and
    NCCL (pytorch issue 135712); it numbers the starts alike only on the ranks of one machine.
    """
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if kept and restarts and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise UserError(
            "torchrun --max-restarts on several machines starts nothing twice unless "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set in its environment: set it"
        )
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else ""
    return dist.PrefixStore(f"start{start}", store)


def _watch_each_other(rank: int, size: int, deadline_s: float) -> None:
    global _heartbeat
    if size > 1:
        _heartbeat = Heartbeat(shared_store(), rank, size, patience_s=min(PATIENCE_S, deadline_s))


def shutdown() -> None:
    """Leave the process groups, all ranks together; safe to call twice."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None
        dist.barrier()  # rank 0 may hold the store
    if dist.is_initialized():
        dist.destroy_process_group()
