"""Router replay: the experts chosen in one pass over the micro-batches, used again in a later one.

Between the old policy's log-probs and an update the weights move, and a token may go to other
experts than those it was scored with: a jump in its probability ratio that no gradient answers for
(R3, arXiv 2510.11370).  Replayed, a token keeps its experts; their weights are computed from the
present logits.

Every router passes through the micro-batches in order, under the pipeline schedule too; that tells
which recorded choice a forward belongs to.

Shape legend: T tokens of this rank, E experts, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from r1kern import ops
from r1kern.model.moe import Router

# int16 [T, K] of each micro-batch, for each router of this rank; empty for one that did not run.
Choices = list[list[torch.Tensor]]


class Recorder:
    """Keeps one router's choices."""

    def __init__(self):
        self.choices: list[torch.Tensor] = []

    def __call__(self, logits, routing: ops.Routing, scale: float) -> ops.Routing:
        self.choices.append(routing.indices.short())
        return routing


class Player:
    """Compares one router's choices with the recorded ones and, with `replay`, puts those in place.

    A recomputed forward is given the choice of the forward that it repeats, and counted once.

    Attributes:
        agreed: int64 0-d, recorded choices that the router made as well.
        strayed: int64 0-d, rows of the permuted layout whose expert is not the recorded one.
    """

    def __init__(self, choices: list[torch.Tensor], *, replay: bool):
        self.choices, self.replay = choices, replay
        self.forwards, self.to_repeat = 0, deque()
        self.agreed = self.strayed = torch.zeros([], dtype=torch.int64, device=choices[0].device)

    def __call__(self, logits, routing: ops.Routing, scale: float) -> ops.Routing:
        """float32 [T, E] and what the router makes of them -> the routing to use."""
        recorded = self._next(routing)
        if not self.replay:
            return routing
        replayed = ops.reroute(logits, routing, recorded, scale=scale)
        expert_of_row = torch.arange(len(replayed.counts), device=logits.device).repeat_interleave(
            replayed.counts, output_size=recorded.numel()
        )
        strayed = expert_of_row != recorded.flatten()[replayed.order.long()]
        self.strayed = self.strayed + strayed.sum()
        return replayed

    def _next(self, routing: ops.Routing) -> torch.Tensor:
        """int64 [T, K]."""
        if torch.is_grad_enabled() and self.to_repeat:
            return self.choices[self.to_repeat.popleft()].long()
        recorded = self.choices[self.forwards].long()
        assert recorded.shape == routing.indices.shape, (recorded.shape, routing.indices.shape)
        same = recorded[:, :, None] == routing.indices[:, None]
        self.agreed = self.agreed + same.sum()
        if not torch.is_grad_enabled():  # checkpointed: the backward comes here again
            self.to_repeat.append(self.forwards)
        self.forwards += 1
        return recorded


@contextmanager
def recording(model: torch.nn.Module) -> Iterator[Choices]:
    """Fills the list with the choices of the forwards within the block."""
    recorders = [Recorder() for _ in _routers(model)]
    with _taped(model, recorders):
        yield [recorder.choices for recorder in recorders]


@contextmanager
def playing(
    model: torch.nn.Module, choices: Choices | None, *, replay: bool
) -> Iterator[list[Player]]:
    """Every forward within the block meets its recorded choices, from `recording` on this rank.

    A router without any (a multi-token-prediction layer's) is left alone, all are with None.
    """
    choices = [[] for _ in _routers(model)] if choices is None else choices
    players = [Player(c, replay=replay) if c else None for c in choices]
    with _taped(model, players):
        yield [p for p in players if p is not None]
    for player in filter(None, players):
        assert player.forwards == len(player.choices), (player.forwards, len(player.choices))
        # All repeated by the backward, or, without one, none.
        assert len(player.to_repeat) in (0, player.forwards), player.to_repeat


def agreement(players: list[Player], device: torch.device) -> float | None:
    """Share of the recorded (token, expert) pairs that the routers of all ranks chose as well.

    None where no rank has a router.  Collective.

    Raises:
        AssertionError: a replayed row went to another expert than the recorded one.
    """
    totals = torch.zeros(3, dtype=torch.int64, device=device)
    for p in players:
        pairs = torch.full_like(p.agreed, sum(c.numel() for c in p.choices))
        totals += torch.stack([p.agreed, p.strayed, pairs])
    dist.all_reduce(totals)
    agreed, strayed, pairs = totals.tolist()
    assert strayed == 0, f"{strayed} of {pairs} replayed rows went to another expert"
    return agreed / pairs if pairs else None


def _routers(model: torch.nn.Module) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router)]


@contextmanager
def _taped(model: torch.nn.Module, tapes: list):
    routers = _routers(model)
    for router, tape in zip(routers, tapes, strict=True):
        router.tape = tape
    try:
        yield
    finally:
        for router in routers:
            router.tape = None
