"""Nearest layouts that fit, at the same world size.

The layers are measured once for each tensor-parallel size; everything else is arithmetic.  Context
parallelism is not searched: the trainer has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from r1kern.config import Parallel
from r1kern.hf.fp8_fit import ragged
from r1kern.hf.layout import stage_layers
from r1kern.model.sync_plan import SyncPlan
from r1kern.plan.dry import Cost, Layout, Stage
from r1kern.plan.make import Plan, assemble, measured_costs, plan_of_sync
from r1kern.plan.memory import Shapes, stage_costs
from r1kern.plan.steptime import Machine
from r1kern.plan.trace import Work

WIDTHS = (1, 2, 4, 8)  # tensor parallelism leaves a node only at a great loss


@dataclass(frozen=True)
class Found:
    """A plan with another layout, and how many options it changes."""

    plan: Plan
    changes: int

    def options(self) -> list[str]:
        """As overrides of the command line."""
        p = self.plan
        sizes = {"tp": p.layout.tp, "pp": p.layout.pp, "ep": p.layout.ep}
        layers = ",".join(map(str, p.layout.layers))
        return [
            *(f"parallel.{name}={size}" for name, size in sizes.items()),
            f"parallel.layers=[{layers}]",
            f"train.tokens_per_microbatch={p.config.train.tokens_per_microbatch}",
        ]


def nearest(plan: Plan, hf, *, most: int = 3) -> list[Found]:
    """Layouts that fit, those with fewest changes first, then by modelled step time."""
    found = []
    for width in widths(plan, hf):
        measured = _measure(plan, hf, width)
        for layout, rows in _candidates(plan, hf, width):
            other = _replanned(plan, layout, rows, _with_ep(measured, layout.ep, plan, rows))
            if other.fits:
                found.append(Found(other, _changes(plan, other)))
    found.sort(key=lambda f: (f.changes, sum(f.plan.seconds.values())))
    exact = (_with_own_sync(f, hf) for f in found)
    return list(islice((f for f in exact if f.plan.fits), most))


def _with_own_sync(found: Found, hf) -> Found:
    """With the sync of its own layout: the search takes that of the config's, for speed."""
    plan = found.plan
    sync = plan_of_sync(plan.config, hf, plan.layout)
    return replace(found, plan=_assembled(plan, plan.config, plan.layout, plan.costs, sync))


def widths(plan: Plan, hf) -> list[int]:
    """Tensor-parallel sizes that the model and its precision can be cut into."""
    sizes = (hf.num_attention_heads, hf.num_key_value_heads, hf.vocab_size, hf.intermediate_size)
    return [
        w
        for w in WIDTHS
        if w <= plan.layout.world
        and not any(size % w for size in sizes)
        and not ragged(hf, plan.config.model, w)
    ]


def _measure(plan: Plan, hf, width: int) -> dict[str, Cost]:
    """Costs at this width; experts on two ranks at least, so that their exchange is seen."""
    if width == plan.layout.tp and (plan.layout.ep > 1 or not plan.shapes.experts):
        return plan.costs
    ep = max(2, plan.layout.ep) if plan.shapes.experts else 1
    layout = Layout(width * ep, width, ep, 1, (plan.shapes.layers,))
    return measured_costs(plan.config, hf, layout, plan.shapes, plan.lengths)


def _candidates(plan: Plan, hf, tp: int) -> Iterator[tuple[Layout, int]]:
    world, layers = plan.layout.world, plan.shapes.layers
    experts = plan.shapes.experts
    sizes = [n for n in range(1, experts + 1) if experts % n == 0] if experts else [1]
    longest = plan.config.data.max_prompt_tokens + plan.config.rollout.max_tokens
    budget = plan.config.train.tokens_per_microbatch
    for pp in (n for n in range(1, min(world, layers) + 1) if world % (tp * n) == 0):
        same = pp == plan.layout.pp
        split = plan.layout.layers if same else tuple(stage_layers(layers, Parallel(pp=pp)))
        for ep in (n for n in sizes if world % (n * pp) == 0):
            for rows in sorted({max(longest, budget // n) for n in (1, 2, 4, 8)}):
                yield Layout(world, tp, ep, pp, split), rows


def _with_ep(costs: dict[str, Cost], ep: int, plan: Plan, rows: int) -> dict[str, Cost]:
    """Costs for another number of expert-parallel ranks and of rows (all are linear in rows)."""
    share = rows / plan.config.train.tokens_per_microbatch
    groups = [n for c in costs.values() for kind, n in c.forward.traffic if "alltoall" in kind]
    measured_at = max(groups, default=1)

    def work(w: Work) -> Work:
        ranks = {
            (kind, ep if "alltoall" in kind else n): (sent, w.calls[kind, n])
            for (kind, n), sent in w.traffic.items()
        }
        return Work(
            w.flops * share,
            w.fp8_flops * share,
            w.attention_flops * share,
            w.moved * share,
            w.kernels,
            Counter({key: sent * share for key, (sent, _) in ranks.items()}),
            Counter({key: calls for key, (_, calls) in ranks.items()}),
        )

    def codes(c: Cost) -> float:
        """Two for each expert's parameter that is elsewhere now."""
        return c.codes and c.codes - 2 * (c.expert - c.expert * measured_at // ep)

    return {
        name: replace(
            c,
            codes=codes(c),
            expert=c.expert * measured_at // ep,
            saved=c.saved * share,
            working=c.working * share,
            forward_peak=c.forward_peak * share,
            forward=work(c.forward),
            backward=work(c.backward),
        )
        for name, c in costs.items()
    }


def _replanned(plan: Plan, layout: Layout, rows: int, costs: dict[str, Cost]) -> Plan:
    train = plan.config.train.model_copy(update={"tokens_per_microbatch": rows})
    config = plan.config.model_copy(update={"train": train})
    return _assembled(plan, config, layout, costs, plan.sync)


def _assembled(plan: Plan, config, layout: Layout, costs: dict[str, Cost], sync: SyncPlan) -> Plan:
    machine = Machine(plan.gpu, plan.assumed)
    stages = stages_of(layout, costs, plan.shapes)
    return assemble(config, layout, machine, plan.lengths, stages, costs, plan.shapes, sync)


def stages_of(layout: Layout, costs: dict[str, Cost], shapes: Shapes) -> list[Stage]:
    """Parameters of each stage, added up from its pieces."""
    stages = []
    for i in range(layout.pp):
        pieces = stage_costs(i, layout, shapes, costs)
        stages.append(
            Stage(
                layout.layers[i],
                sum(piece.dense for piece in pieces),
                sum(piece.expert for piece in pieces),
                0,
            )
        )
    if shapes.tied and layout.pp == 1:
        stages[-1] = replace(stages[-1], dense=stages[-1].dense - costs["head"].dense)
    if shapes.depths and layout.pp > 1:
        stages[-1] = replace(stages[-1], dense=stages[-1].dense + costs["embedding"].dense)
    return stages


def _changes(plan: Plan, other: Plan) -> int:
    here, there = plan.layout, other.layout
    same = (
        here.tp == there.tp,
        here.pp == there.pp,
        here.ep == there.ep,
        plan.config.train.tokens_per_microbatch == other.config.train.tokens_per_microbatch,
    )
    return same.count(False)
