"""PPO with a value model (arXiv 1707.06347): the baseline that GRPO replaces.

`PPO.step` is the algorithm.  Sampling, grading, weight sync, evaluation and checkpoints are those
of `GRPO`; what differs is that a critic of the policy's size, trained beside it, gives each token
an advantage of its own (arXiv 2501.12948, Figure 4, where lambda is 0.95 or 1; arXiv 2402.03300,
equations 1 and 2) instead of the group giving one to the whole completion.

Where this differs from the paper, which names few details: the objective is the mean over all
tokens of the batch; advantages are whitened unless `ppo.whiten` is off; one pass over each batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from r1kern.config import PPOConfig
from r1kern.distributed import World
from r1kern.rewards.score import Reward
from r1kern.train.grpo import GRPO, Update
from r1kern.train.head import ValueLoss
from r1kern.train.objective import counts, split
from r1kern.train.packing import plan_batches
from r1kern.train.policy import Policy
from r1kern.train.ppo_objective import critic_loss, ppo_policy_loss, to_rewarded, with_advantages
from r1kern.train.step_metrics import rollout_metrics
from r1kern.types import Rollout


@dataclass(frozen=True, kw_only=True)
class PPOUpdate(Update):
    """An optimizer step of the policy and one of the critic, on the same micro-batches."""

    critic_loss: ValueLoss


class PPO(GRPO):
    """GRPO's trainer and generator with another step, and a critic.

    The critic's gradients and optimizer state are on the GPU during its own update alone
    (`train.offload_in_rollout`); its weights stay.
    """

    config: PPOConfig
    critic: Policy

    def __init__(
        self, config: PPOConfig, world: World, *, rewards: dict[str, Reward] | None = None
    ):
        super().__init__(config, world, rewards=rewards)
        self.critic = Policy(
            config.model.model_copy(
                update={"path": config.ppo.critic or config.model.path, "mtp_coef": 0.0}
            ),
            config.parallel,
            config.ppo.optim,
            world,
            total_updates=config.train.steps * config.grpo.updates_per_batch,
            experts=config.experts,
            recompute=config.train.recompute,
            scalar_head=True,
        )

    def step(self) -> dict[str, float]:
        """Sample, value, estimate advantages, update critic and policy, sync; the metrics."""
        options, ledger = self.config.grpo, self.ledger
        metrics = self.sample()
        with ledger("pack"):
            updates = [self.prepare(p) for p in split(self.rollouts, options.updates_per_batch)]
        if len(updates) > 1 or options.beta > 0:
            with ledger("old log-probs"):
                updates = [self.with_old_policy(u) for u in updates]
        if options.beta > 0:
            with ledger("ref log-probs"), self.policy.reference():
                updates = [self.with_logps(u, "ref_logps") for u in updates]
        with ledger("values"):
            updates = [self.with_values(u) for u in updates]
        with ledger("advantages"):
            updates, told = self.with_advantages(updates)
        metrics |= rollout_metrics(self.rollouts) | told
        with ledger("update critic"):
            self.critic.host_copies.back()
            for update in updates:
                found = self.critic.update(update.batches, update.critic_loss)
                metrics |= update.waste | {f"value/{name}": x for name, x in found.items()}
            self._rest_critic()
        if self.done >= self.config.ppo.critic_warmup_steps:
            with ledger("update"):
                for update in updates:
                    metrics |= self.policy.update(
                        update.batches,
                        update.loss,
                        self.temperature,
                        choices=update.choices,
                        replay=self.config.experts.replay == "old_policy",
                    )
            self._check_mismatch(metrics["max_mismatch"])
        return metrics | self.hand_over() | {"value/lr": self.critic.lr}

    # -- parts of a step --------------------------------------------------------------------

    def prepare(self, rollouts: list[Rollout]) -> PPOUpdate:
        """Rewards, denominators and this replica's micro-batches of one update."""
        sequences = to_rewarded(rollouts, self.config.grpo)
        num_tokens = counts(sequences)["num_tokens"]
        plan = plan_batches(
            sequences,
            budget=self.config.train.tokens_per_microbatch,
            dp=self.world.dp,
            multiple=self.world.tp,
            hf=self.policy.hf,
        )
        return PPOUpdate(
            plan.batches(self.world.dp_rank, self.world.device),
            partial(ppo_policy_loss, options=self.config.grpo, num_tokens=num_tokens),
            plan.waste(),
            critic_loss=partial(
                critic_loss, clip=self.config.ppo.value_clip, num_tokens=num_tokens
            ),
        )

    def with_values(self, update: PPOUpdate) -> PPOUpdate:
        """`update` with the present critic's value of the state each token was sampled in."""
        grids = self.critic.values(update.batches)
        batches = [
            dataclasses.replace(batch, values=grid)
            for batch, grid in zip(update.batches, grids, strict=True)
        ]
        return dataclasses.replace(update, batches=batches)

    def with_advantages(self, updates: list[PPOUpdate]) -> tuple[list[PPOUpdate], dict[str, float]]:
        """`updates` with returns and advantages of every token, and metrics of them."""
        batches = [update.batches for update in updates]
        estimated, metrics = with_advantages(batches, self.config.ppo, self.config.grpo.beta)
        replaced = zip(updates, estimated, strict=True)
        return [dataclasses.replace(u, batches=found) for u, found in replaced], metrics

    def _to_generator(self, tag: str) -> dict[str, float]:
        with self.ledger("wake"):
            self._rest_critic()
        return super()._to_generator(tag)

    def _rest_critic(self) -> None:
        if self._offloads:
            self.critic.host_copies.out()
