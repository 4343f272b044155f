"""A reward model from preferences by the Bradley-Terry model."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from transformers import PretrainedConfig

from r1kern.config import RewardConfig
from r1kern.data.dataset import load_preferences
from r1kern.data.reading import Preference, Reading, hold_out
from r1kern.data.stream import Stream
from r1kern.data.tokenizer import load_tokenizer
from r1kern.distributed import World
from r1kern.hf.flops import ModelFlops
from r1kern.report.ledger import Ledger
from r1kern.train.head import ValueHead
from r1kern.train.packing import Plan, balance
from r1kern.train.policy import Policy
from r1kern.train.reading_entry import reading_entry
from r1kern.types import PackedBatch


class RewardTrainer:
    """Bradley-Terry on (chosen, rejected) pairs, mean over the pairs of the global batch.

    The paper trains its helpfulness and safety models so (arXiv 2501.12948 says only "preference
    pairs"; the loss is that of arXiv 2203.02155).  A pair is one comparison; K ranked responses are
    K (K - 1) / 2 records.  The loss leaves the rewards' mean open, and nothing here fixes it:
    advantages within a group do not see it.
    """

    critic = None

    def __init__(self, config: RewardConfig, world: World):
        self.config, self.world, self.ledger = config, world, Ledger(config.run.deadline_s)
        pairs, self.held_out = load_sets(config)
        self.pairs = Stream(pairs, config.run.seed)
        self.policy = Policy(
            config.model,
            config.parallel,
            config.optim,
            world,
            total_updates=config.train.steps,
            experts=config.experts,
            recompute=config.train.recompute,
            scalar_head=True,
        )
        self.policy.config_entries = reading_entry(config.data)

    def step(self) -> dict[str, float]:
        """One update on the next pairs."""
        with self.ledger("pack"):
            pairs = self.pairs.next(self.config.train.batch_size)
            plan = self._plan(pairs)
            batches = plan.batches(self.world.dp_rank, self.world.device)
        with self.ledger("update"):
            metrics = self.policy.update(batches, partial(bradley_terry, num_pairs=len(pairs)))
        tokens = float(sum(map(len, pairs)))
        return metrics | plan.waste() | {"tokens": tokens, "lr": self.policy.lr}

    def evaluate(self) -> tuple[dict[str, float], str] | None:
        """Loss, accuracy and margin on the held-out pairs."""
        if not self.held_out:
            return None
        with self.ledger("evaluate"):
            plan = self._plan(self.held_out)
            grids = self.policy.values(plan.batches(self.world.dp_rank, self.world.device))
            sums = torch.stack([_sums(grid.flatten()) for grid in grids]).sum(0)
            dist.all_reduce(sums, group=mpu.get_data_parallel_group())
            loss, accuracy, margin = (sums / len(self.held_out)).tolist()
        metrics = {"eval/loss": loss, "eval/accuracy": accuracy, "eval/margin": margin}
        return metrics, (
            f"held-out accuracy {100 * accuracy:.1f} % of {len(self.held_out)} pairs, "
            f"loss {loss:.4f}, margin {margin:.3f}"
        )

    def _plan(self, pairs: list[Preference]) -> Plan:
        return plan_pairs(
            pairs,
            budget=self.config.train.tokens_per_microbatch,
            dp=self.world.dp,
            multiple=self.world.tp,
            hf=self.policy.hf,
        )

    def state(self) -> dict:
        return {"pairs": self.pairs.state()}

    def restore(self, state: dict) -> None:
        self.pairs.restore(state["pairs"])


def bradley_terry(
    head: ValueHead, batch: PackedBatch, *, num_pairs: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-log sigmoid(r_chosen - r_rejected) (arXiv 2203.02155, equation 1).

    Args:
        head: one value a sequence; sequences 2 i and 2 i + 1 are the i-th chosen and rejected.
        num_pairs: of the global batch.
    """
    values = head.values()
    loss = -F.logsigmoid(_margins(values)).sum() / num_pairs
    _, accuracy, margin = _sums(values.detach()) / num_pairs
    return loss, {"accuracy": accuracy, "margin": margin}


def _margins(values: torch.Tensor) -> torch.Tensor:
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen - rejected


def _sums(values: torch.Tensor) -> torch.Tensor:
    """float64 [3]: loss, pairs in the right order, margins, each summed over the pairs."""
    margins = _margins(values.double())
    return torch.stack([-F.logsigmoid(margins), (margins > 0).double(), margins]).sum(1)


def plan_pairs(
    pairs: list[Preference], *, budget: int, dp: int, multiple: int, hf: PretrainedConfig
) -> Plan:
    """Every pair to a turn and a rank, both its sequences to the same micro-batch.

    The loss couples them: apart, each would need the other's value before its backward.

    Args:
        pairs: of the global batch, none with more rows than the budget.
        budget, dp, multiple, hf: as in `packing.plan_batches`.
    """
    sequences = [s for pair in pairs for s in (pair.chosen, pair.rejected)]
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    costs = ModelFlops.of(hf).sequence(lengths, np.ones_like(lengths)).astype(np.float64)
    of_pairs = balance(lengths.reshape(-1, 2).sum(1), costs.reshape(-1, 2).sum(1), budget, dp)
    turns = [[(2 * b[:, None] + np.arange(2)).ravel() for b in turn] for turn in of_pairs]
    return Plan(sequences, turns, costs, multiple)


def load_sets(config: RewardConfig) -> tuple[list[Preference], list[Preference]]:
    """Pairs to train on and pairs to evaluate on.

    Raises:
        UserError: a source or a record is bad, or a pair is over the budget.
    """
    data = config.data
    read = partial(
        load_preferences,
        tokenizer=load_tokenizer(
            config.model.path, trust_remote_code=config.model.trust_remote_code
        ),
        reading=Reading(data.template, data.reads),
        max_tokens=config.model.max_positions,
        max_pair_tokens=config.train.tokens_per_microbatch,
        overlong=data.overlong,
        where=data.where,
    )
    pairs = read(data.train)
    if data.eval:
        return pairs, read(data.eval)
    return hold_out(pairs, data.held_out, config.run.seed)
