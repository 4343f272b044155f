"""All ranks hold the same, or an error on every rank names the one that does not.

Ranks that enter collectives with different options, data or plans hang or mix bytes up.  The
agreement goes through the process group's key-value store, where a rank that never comes can be
told from one that came with something else.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta

import torch.distributed as dist

from r1kern.errors import UserError

READ_S = 5.0  # for the other ranks to read what is wrong


class Disagreement(UserError):
    """Ranks differ, or one did not come; the message names it."""


def shared_store() -> dist.Store:
    """The default process group's store, under a prefix of our own."""
    return dist.PrefixStore("r1kern", dist.distributed_c10d._get_default_store())


def agree(what: str, value: dict, *, deadline_s: float) -> None:
    """Return once every rank has come with an equal `value`; all ranks call it together.

    Args:
        what: names the agreement; ranks may be in one agreement of a name at a time.
        value: JSON values by name, nested.
        deadline_s: seconds to wait for the others.

    Raises:
        Disagreement: on every rank; names the ranks that differ from rank 0 and the first keys in
            which they do, or the first rank that did not come.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        return
    store = shared_store()
    # The others cannot come a second time before all have come once: the count tells the rounds.
    arrivals = store.add(f"agree/{what}/arrivals", 1)
    number = (arrivals - 1) // size
    key, before = (f"agree/{what}/{n}" for n in (number, number - 1))
    store.set(f"{key}/{rank}", json.dumps(value))
    store.delete_key(f"{before}/{rank}")
    if rank == 0:
        store.set(f"{key}/verdict", _verdict(store, key, what, size, deadline_s))
        store.delete_key(f"{before}/verdict")  # all have come here, past the round before
    if not _came(store, [f"{key}/verdict"], 1.5 * deadline_s):
        raise Disagreement(f"{what}: rank 0 did not come within {1.5 * deadline_s:.0f} s")
    if verdict := store.get(f"{key}/verdict").decode():
        _let_all_read(store, f"{key}/read", rank, size)
        raise Disagreement(verdict)


def _let_all_read(store: dist.Store, key: str, rank: int, size: int) -> None:
    """Rank 0 may hold the store: it does not leave before the others have read from it."""
    store.add(key, 1)
    end = time.monotonic() + READ_S
    while rank == 0 and store.add(key, 0) < size and time.monotonic() < end:
        time.sleep(0.05)


def _verdict(store: dist.Store, key: str, what: str, size: int, deadline_s: float) -> str:
    """What is wrong, on rank 0; empty when all have come with the same."""
    keys = [f"{key}/{rank}" for rank in range(size)]
    if not _came(store, keys, deadline_s):
        rank = next(r for r, k in enumerate(keys) if not store.check([k]))
        return f"{what}: rank {rank} did not come within {deadline_s:.0f} s"
    first, *others = [_flat(json.loads(found)) for found in store.multi_get(keys)]
    different = {r: other for r, other in enumerate(others, 1) if other != first}
    return _differences(what, first, different) if different else ""


def _differences(what: str, first: dict, different: dict[int, dict]) -> str:
    rank, other = next(iter(different.items()))
    keys = [k for k in {**first, **other} if first.get(k) != other.get(k)]
    shown = "; ".join(
        f"{key} is {other.get(key)} on rank {rank} and {first.get(key)} on rank 0"
        for key in keys[:3]
    )
    more = f"; {len(keys) - 3} more" if len(keys) > 3 else ""
    ranks = f"rank{'s' * (len(different) > 1)} {', '.join(map(str, different))}"
    return (
        f"{what} of {ranks} and of rank 0 differ: {shown}{more}. Start all ranks with the same "
        f"files, overrides and versions"
    )


def _flat(value: dict, prefix: str = "") -> dict:
    flat = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def _came(store: dist.Store, keys: list[str], seconds: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return False
    return True
