"""An endless, resumable walk over a training set."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Generic, TypeVar

from r1kern.errors import UserError

T = TypeVar("T")


class Stream(Generic[T]):
    """Items in a new order every epoch, each order given by `seed` and the epoch alone.

    Args:
        items: the training set (prompts, pairs: any frozen dataclass); not empty.
        seed: of all orders.

    Attributes:
        items: the training set.
    """

    def __init__(self, items: Sequence[T], seed: int):
        if not items:
            raise UserError("nothing to train on: the data set is empty")
        self.items = tuple(items)
        self._seed = seed
        self._digest = _digest(self.items)
        self._epoch = 0
        self._index = 0
        self._order = self._shuffled()

    def next(self, count: int) -> list[T]:
        """The next `count` items, going on into the next epochs where one ends."""
        assert count > 0
        batch: list[T] = []
        while len(batch) < count:
            if self._index == len(self._order):
                self._epoch, self._index = self._epoch + 1, 0
                self._order = self._shuffled()
            taken = self._order[self._index : self._index + count - len(batch)]
            batch += [self.items[i] for i in taken]
            self._index += len(taken)
        return batch

    def state(self) -> dict[str, int | str]:
        """Where the walk stands, for a checkpoint: plain JSON values."""
        return {
            "seed": self._seed,
            "digest": self._digest,
            "epoch": self._epoch,
            "index": self._index,
        }

    def restore(self, state: dict[str, int | str]) -> None:
        """Goes on from a `state()`.

        Raises:
            UserError: the state is of another data set or seed.
        """
        if state["digest"] != self._digest:
            raise UserError(
                "the checkpoint was made with other training data: resume with the same data "
                "and template, or start a new run"
            )
        if state["seed"] != self._seed:
            raise UserError(
                f"the checkpoint was made with seed {state['seed']}, not {self._seed}: resume with "
                "the same seed, or start a new run"
            )
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self.items)))
        random.Random(f"{self._seed}:{self._epoch}").shuffle(order)
        return order


def _digest(items: Sequence[T]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]
