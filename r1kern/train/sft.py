"""Supervised fine-tuning on prompt and completion pairs: the cold start."""

from __future__ import annotations

from functools import partial

import torch

from r1kern.config import SFTConfig
from r1kern.data.dataset import load_pairs
from r1kern.data.stream import Stream
from r1kern.data.tokenizer import load_tokenizer
from r1kern.distributed import World
from r1kern.report.ledger import Ledger
from r1kern.train.head import Head
from r1kern.train.packing import plan_batches
from r1kern.train.policy import Policy
from r1kern.types import PackedBatch


class SFT:
    """Next-token prediction on the completions, mean over the tokens of the global batch."""

    critic = None

    def __init__(self, config: SFTConfig, world: World):
        self.config, self.world, self.ledger = config, world, Ledger(config.run.deadline_s)
        tokenizer = load_tokenizer(
            config.model.path, trust_remote_code=config.model.trust_remote_code
        )
        pairs = load_pairs(
            config.data.train,
            tokenizer=tokenizer,
            template=config.data.template,
            max_tokens=min(config.model.max_positions, config.train.tokens_per_microbatch),
            overlong=config.data.overlong,
            where=config.data.where,
        )
        self.pairs = Stream(pairs, config.run.seed)
        self.policy = Policy(
            config.model,
            config.parallel,
            config.optim,
            world,
            total_updates=config.train.steps,
            experts=config.experts,
            recompute=config.train.recompute,
        )

    def step(self) -> dict[str, float]:
        """One update on the next batch."""
        with self.ledger("pack"):
            sequences = self.pairs.next(self.config.train.batch_size)
            tokens = sum(len(s.completion_ids) for s in sequences)
            plan = plan_batches(
                sequences,
                budget=self.config.train.tokens_per_microbatch,
                dp=self.world.dp,
                multiple=self.world.tp,
                hf=self.policy.hf,
            )
            batches = plan.batches(self.world.dp_rank, self.world.device)
        with self.ledger("update"):
            metrics = self.policy.update(batches, partial(sft_loss, num_tokens=tokens))
        return metrics | plan.waste() | {"tokens": float(tokens), "lr": self.policy.lr}

    def evaluate(self) -> None:
        """Nothing to evaluate: the stage that follows measures what was learnt."""

    def state(self) -> dict:
        return {"pairs": self.pairs.state()}

    def restore(self, state: dict) -> None:
        self.pairs.restore(state["pairs"])


def sft_loss(
    head: Head, batch: PackedBatch, *, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the completion tokens over the global count, `num_tokens`."""
    logps, entropies = head.logprobs()
    return -logps.sum() / num_tokens, {"entropy": entropies.detach().sum() / num_tokens}
