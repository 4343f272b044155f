"""vLLM's memory given back to the trainer between rollouts (CUDA).

vLLM allocates weights and cache through the driver's virtual memory (its `CuMemAllocator`); level 2
of its sleep discards both, and waking maps fresh memory under the same addresses, with nothing in
it: a sync that misses no parameter (`sync.check_received`) must follow.  vLLM itself keeps the
model's buffers (rope tables) in host memory meanwhile and derives what latent attention absorbs
when the reload ends.

Written from the sources of vLLM 0.32.0 (`v1/worker/gpu_worker.py`, `device_allocator/cumem.py`,
`device_allocator/sleep_mode_backend.py`); it has not been run on a GPU.  What it computes from a
worker and from figures is tested on CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from r1kern.errors import UserError

TAGS = ("weights", "kv_cache")  # what wakes by itself, in the order of waking
TOLERANCE = 0.02  # of the weights and the cache; the allocator maps whole pages of 2 MiB


@dataclass(frozen=True)
class SleepReport:
    """What one sleep gave back.

    Attributes:
        freed: bytes of device memory.
        host: bytes that vLLM keeps in host memory until it wakes.
        seconds: wall clock.
    """

    freed: int
    host: int
    seconds: float


def check_allocator(variables: Mapping[str, str]) -> None:
    """Raises UserError when torch's allocator is set to what defeats the freeing."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        fields = variables.get(name, "").replace(" ", "").lower().split(",")
        if "expandable_segments:true" in fields or "expandable_segments:1" in fields:
            raise UserError(
                f"{name} sets expandable_segments, with which a sleeping generator frees nothing: "
                "unset it or set generator.sleep=false"
            )


def sleep(llm) -> SleepReport:
    """Discards the engine's weights and cache.

    Raises:
        RuntimeError: less device memory came free than they held.
    """
    start = time.perf_counter()
    (held,) = llm.collective_rpc(held_bytes)
    before = _free_memory()
    llm.sleep(level=2)
    freed = _free_memory() - before
    check_freed(freed, held)
    (host,) = llm.collective_rpc(host_bytes)
    return SleepReport(freed, host, time.perf_counter() - start)


def wake(llm, tag: str) -> None:
    """Maps memory for `tag` again, after torch has let go of what it only caches."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    llm.wake_up([tag])


def held_bytes(worker) -> int:
    """Weights and cache of a vLLM worker, in bytes of device memory."""
    runner = worker.model_runner
    return storage_bytes([*runner.get_model().parameters(), *_tensors(runner.kv_caches)])


def host_bytes(worker) -> int:
    """Host memory in which a sleeping vLLM worker keeps its buffers, in bytes."""
    return storage_bytes(worker._sleep_saved_buffers.values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def check_freed(freed: int, held: int) -> None:
    """Raises RuntimeError unless `freed` bytes are about the `held` ones."""
    if freed < (1 - TOLERANCE) * held:
        raise RuntimeError(
            f"the generator's sleep freed {freed / 2**30:.2f} GiB, its weights and cache are "
            f"{held / 2**30:.2f} GiB: something else allocated meanwhile, or torch's allocator "
            "runs with expandable_segments (see PYTORCH_CUDA_ALLOC_CONF)"
        )


def _tensors(caches) -> list[torch.Tensor]:
    """Some attention kinds have several tensors a layer."""
    return [t for c in caches for t in (c if isinstance(c, (list, tuple)) else [c])]


def _free_memory() -> int:
    """Bytes of device memory that the driver could give out, torch's own cache included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
