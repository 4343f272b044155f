"""All ranks agree before a collective, or an error names the rank that does not.

A collective that ranks enter with different plans hangs or mixes bytes up.  The agreement goes
through the process group's key-value store, where a rank that never comes can be told from one that
came with something else.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


class Disagreement(RuntimeError):
    """Ranks came to a collective with different values, or not at all; the message names one."""


def agree(what: str, value: str, deadline_s: float) -> None:
    """Returns once every rank has come with an equal `value`; all ranks call it together.

    Args:
        what: names the agreement; ranks may be in one agreement of a name at a time.
        value: must be equal on all ranks.
        deadline_s: seconds to wait for the others.

    Raises:
        Disagreement: on every rank, naming the first rank that differs or did not come.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        return
    store = _get_default_store()
    # the others cannot come a second time before all have come once: the count tells the rounds
    arrivals = store.add(f"r1kern/{what}/arrivals", 1)
    key = f"r1kern/{what}/{(arrivals - 1) // size}"
    store.set(f"{key}/{rank}", value)
    if rank == 0:
        store.set(f"{key}/verdict", _verdict(store, key, what, value, deadline_s))
    if not _came(store, f"{key}/verdict", 1.5 * deadline_s):
        raise Disagreement(f"{what}: rank 0 did not come within {1.5 * deadline_s:.0f} s")
    if verdict := store.get(f"{key}/verdict").decode():
        raise Disagreement(verdict)


def _verdict(store, key: str, what: str, value: str, deadline_s: float) -> str:
    """Empty when every rank has come with `value`."""
    keys = [f"{key}/{rank}" for rank in range(dist.get_world_size())]
    if not _came(store, keys, deadline_s):
        rank = next(r for r, k in enumerate(keys) if not store.check([k]))
        return f"{what}: rank {rank} did not come within {deadline_s:.0f} s"
    for rank, found in enumerate(store.multi_get(keys)):
        if found.decode() != value:
            return f"{what}: rank {rank} has '{found.decode()}', rank 0 has '{value}'"
    return ""


def _came(store, keys: str | list[str], seconds: float) -> bool:
    try:
        store.wait([keys] if isinstance(keys, str) else keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return False
    return True
