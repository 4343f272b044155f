"""GRPO: group-relative policy optimisation (arXiv 2402.03300; DeepSeek-R1, arXiv 2501.12948).

`GRPO.step` is the algorithm.  Where it differs from the paper's equations is said in
`ops.grpo_loss`; the old policy's log-probs come from the trainer, and the generator's own are kept
to measure the mismatch between the two and, by option, to weigh it out (truncated importance
sampling).
"""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from r1kern import watch
from r1kern.agreement import agree
from r1kern.config import TrainConfig
from r1kern.data.dataset import load_prompts
from r1kern.data.stream import Stream
from r1kern.data.tokenizer import load_tokenizer
from r1kern.distributed import World
from r1kern.eval.heldout import summarise
from r1kern.generate.engine import Generator, Sampling
from r1kern.generate.sync import SyncReport
from r1kern.hf.names import hf_shapes
from r1kern.model.replay import Choices
from r1kern.report.ledger import Ledger
from r1kern.report.rollouts import step_file, write_rollouts
from r1kern.rewards.model_terms import add_terms
from r1kern.rewards.score import Reward, Scorer
from r1kern.train.head import Loss
from r1kern.train.interrupted import interrupted_rollouts, sampled_by
from r1kern.train.objective import counts, grpo_step_loss, split, to_sequences
from r1kern.train.packing import plan_batches
from r1kern.train.policy import Policy
from r1kern.train.reward_scorer import RewardModels
from r1kern.train.step_metrics import rollout_metrics, sync_metrics
from r1kern.types import PackedBatch, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """One optimizer step to be: this replica's micro-batches, their loss, the packing's waste."""

    batches: list[PackedBatch]
    loss: Loss
    waste: dict[str, float]
    choices: Choices | None = None  # experts of the old policy's pass


class GRPO:
    """Trainer and generator of one run, sharing this process.

    Args:
        config: all options.
        world: from `distributed.start`, with the layout of `config.parallel`.
        rewards: reward terms of one's own, by the name used in `config.rewards`.

    Attributes:
        policy, generator: the two stateful parts.
        rollouts: the graded groups of the last step, of all replicas.
        critic: no second model (see `PPO`).
    """

    critic: Policy | None = None

    def __init__(
        self, config: TrainConfig, world: World, *, rewards: dict[str, Reward] | None = None
    ):
        self.config, self.world, self.ledger = config, world, Ledger(config.run.deadline_s)
        self.scorer = Scorer(
            config.rewards,
            options=config.grading,
            max_tokens=config.rollout.max_tokens,
            extra=rewards,
            later=config.reward_models,
        )
        self._held_out_scorer = Scorer({"accuracy": 1.0, "format": 0.0}, options=config.grading)
        tokenizer = load_tokenizer(
            config.model.path, trust_remote_code=config.model.trust_remote_code
        )
        read = partial(
            load_prompts,
            tokenizer=tokenizer,
            template=config.data.template,
            max_prompt_tokens=config.data.max_prompt_tokens,
            overlong=config.data.overlong,
            where=config.data.where,
        )
        self.prompts = Stream(read(config.data.train), config.run.seed)
        self.held_out = read(config.data.eval) if config.data.eval else []
        self.scorer.prepare(self.prompts.items)
        self._held_out_scorer.prepare(self.held_out)
        self.policy = Policy(
            config.model,
            config.parallel,
            config.optim,
            world,
            total_updates=config.train.steps * config.grpo.updates_per_batch,
            experts=config.experts,
            recompute=config.train.recompute,
        )
        if config.grpo.beta > 0:
            self.policy.keep_reference()
        self.reward_models = None
        if config.reward_models:
            self.reward_models = RewardModels(
                config.reward_models,
                world,
                like=config.model,
                parallel=config.parallel,
                tokens_per_microbatch=config.train.tokens_per_microbatch,
            )
        self.generator = Generator(
            config.model.path,
            dtype=config.model.dtype,
            tensor_parallel=config.parallel.generator_tp,
            max_model_len=config.model.max_positions,
            max_num_seqs=config.generator.max_seqs,
            kv_cache_gib=config.generator.kv_cache_gib,
            enforce_eager=config.generator.enforce_eager,
            device=world.device.type,
            tokenizer=tokenizer,
            load_weights=False,
            trust_remote_code=config.model.trust_remote_code,
            can_sleep=config.generator.sleep,
            quantized=config.generator.fp8,
            power_of_two=config.model.fp8_scales == "power_of_two",
        )
        self.sync_plan = self.policy.sync_plan(config.generator.sync_bucket_mib)
        self.sampling = Sampling(
            n=config.rollout.group_size,
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            stop_ids=(tokenizer.eos_token_id,),
        )
        self.temperature = config.rollout.temperature
        self._offloads = config.train.offload_in_rollout and world.device.type == "cuda"
        if config.train.offload_in_rollout and not self._offloads:
            log.info("train.offload_in_rollout: on CPU there is no other memory to offload to")
        self.rollouts: list[Rollout] = []
        self._interrupted: list[Rollout] = []  # of the step in which the last process was killed
        self.done = 0
        self.sync()

    def step(self) -> dict[str, float]:
        """Sample, score, advantage, pack, update, sync; returns the step's metrics."""
        options, ledger = self.config.grpo, self.ledger
        metrics = self.sample()
        with ledger("pack"):
            updates = [self.prepare(p) for p in split(self.rollouts, options.updates_per_batch)]
        if len(updates) > 1:
            # With one update a batch the old policy is the present one: no pass of its own.
            with ledger("old log-probs"):
                updates = [self.with_old_policy(u) for u in updates]
        if options.beta > 0:
            with ledger("ref log-probs"), self.policy.reference():
                updates = [self.with_logps(u, "ref_logps") for u in updates]
        metrics |= rollout_metrics(self.rollouts)
        with ledger("update"):
            for update in updates:
                metrics |= update.waste
                metrics |= self.policy.update(
                    update.batches,
                    update.loss,
                    self.temperature,
                    choices=update.choices,
                    replay=self.config.experts.replay == "old_policy",
                )
        self._check_mismatch(metrics["max_mismatch"])
        return metrics | self.hand_over()

    # -- parts of a step --------------------------------------------------------------------

    def sample(self) -> dict[str, float]:
        """The step's graded rollouts of all replicas: sampled, or what a killed process left."""
        prompts = self.prompts.next(self.config.rollout.prompts_per_step)
        self.rollouts, self._interrupted = self._interrupted, []
        if [r.prompt for r in self.rollouts] == prompts:
            return self._to_trainer()
        metrics = self._to_generator("kv_cache")
        with self.ledger("rollout"):  # a group is graded while others are still sampled
            graded = self.generate(prompts, self.sampling, seed=self.done, scorer=self.scorer)
        metrics |= self._to_trainer()
        with self.ledger("reward"):
            mine = [group.result() for group in graded]
        with self.ledger("gather"):
            self.rollouts = self.gather(mine)
        if self.reward_models is not None:
            with self.ledger("reward models"):
                self.rollouts = self._with_preferences(self.rollouts)
        with self.ledger("gather"):
            self._keep(step_file(self.config.run.folder, self.done + 1), self.rollouts)
        return metrics

    def generate(
        self, prompts: list, sampling: Sampling, *, seed: int, scorer: Scorer
    ) -> list[Future[Rollout]]:
        """This engine's share of `prompts`, sampled and being graded; `seed` counts calls."""
        engines = self.world.size // self.config.parallel.generator_tp
        engine = self.world.rank // self.config.parallel.generator_tp
        # Distinct for every run seed, call and engine.
        seed = (self.config.run.seed * 1_000_003 + seed) * engines + engine
        mine = prompts[engine::engines]
        watch.at(f"{len(mine)} prompts from {mine[0].id}" if mine else "no prompts")
        graded: dict[int, Future[Rollout]] = {}

        def grade(place: int, rollout: Rollout) -> None:
            graded[place] = scorer.submit(rollout)

        self.generator.generate(mine, sampling, seed % 2**63, grade)
        return [graded[place] for place in range(len(mine))]

    def gather(self, mine: list[Rollout]) -> list[Rollout]:
        """All engines' rollouts, on every rank in the same order."""
        shares: list = [None] * self.world.size
        dist.all_gather_object(shares, mine)
        per_engine = shares[:: self.config.parallel.generator_tp]
        longest = max(len(share) for share in per_engine)
        return [share[i] for i in range(longest) for share in per_engine if i < len(share)]

    def _with_preferences(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts with the reward models' terms where their prompts ask for preferences."""
        weights = {name: self.config.rewards[name] for name in self.config.reward_models}
        tasks = self.config.grading.preference_tasks
        asked = [i for i, rollout in enumerate(rollouts) if rollout.prompt.task in tasks]
        chosen = [rollouts[i] for i in asked]
        scored = add_terms(chosen, self.reward_models.score(chosen), weights) if chosen else []
        result = list(rollouts)
        for i, rollout in zip(asked, scored, strict=True):
            result[i] = rollout
        return result

    def prepare(self, rollouts: list[Rollout]) -> Update:
        """Advantages, denominators and this replica's micro-batches of one update."""
        options = self.config.grpo
        sequences = to_sequences(rollouts, options)
        denominators = counts(sequences)
        by_advantage = options.beta == 0 and options.entropy_coef == 0
        if by_advantage and not self.policy.learns_from_all_tokens:
            # Without KL and entropy terms a sequence without advantage has a gradient of exactly
            # zero; the denominators count it all the same.
            sequences = [s for s in sequences if s.advantage]
        plan = plan_batches(
            sequences,
            budget=self.config.train.tokens_per_microbatch,
            dp=self.world.dp,
            multiple=self.world.tp,
            hf=self.policy.hf,
        )
        loss = partial(
            grpo_step_loss,
            options=options,
            denominators=denominators,
            trained_tokens=counts(sequences)["num_tokens"],
            max_tokens=self.sampling.max_tokens,
        )
        return Update(plan.batches(self.world.dp_rank, self.world.device), loss, plan.waste())

    def with_logps(self, update: Update, field: str) -> Update:
        """`update` with the present weights' log-probs as `field` of its micro-batches."""
        grids = self.policy.logprobs(update.batches, self.temperature)
        batches = [
            dataclasses.replace(batch, **{field: grid})
            for batch, grid in zip(update.batches, grids, strict=True)
        ]
        return dataclasses.replace(update, batches=batches)

    def with_old_policy(self, update: Update) -> Update:
        """`update` with the present weights' log-probs and experts as the old policy's."""
        with self.policy.record_experts() as choices:
            update = self.with_logps(update, "old_logps")
        return dataclasses.replace(update, choices=choices)

    def hand_over(self) -> dict[str, float]:
        """The end of a step: the new weights into the generator."""
        metrics = self._to_generator("weights")
        with self.ledger("sync"):
            metrics |= sync_metrics(self.sync(), self.sync_plan)
        self.done += 1
        return metrics | {"lr": self.policy.lr, "weight_version": float(self.policy.version)}

    def _check_mismatch(self, largest: float) -> None:
        limit = self.config.train.mismatch_limit
        if limit and largest > limit:
            raise RuntimeError(
                f"trainer and generator disagree by {largest:.2e} in a log-prob, the limit "
                f"train.mismatch_limit is {limit:.0e}: the generator's weights or numerics differ"
            )

    def sync(self) -> SyncReport:
        """The policy's weights into the generator, audited.

        Raises:
            Disagreement: a rank would move other tensors or another version, or did not come.
            SyncError: weights did not arrive whole.
        """
        version, plan = self.policy.version, self.sync_plan
        agree(
            "weight sync",
            {"version": version, "plan": plan.fingerprint[:16]},
            # an answer before the phase's own deadline ends the process
            deadline_s=self.config.run.deadline_s / 2,
        )
        return self.generator.sync(
            map(watch.each, self.policy.export_buckets(plan)), hf_shapes(self.policy.hf), version
        )

    def _to_trainer(self) -> dict[str, float]:
        """The GPU's memory to the trainer: the generator sleeps, the optimizer is back."""
        with self.ledger("sleep"):
            report = self.generator.sleep()
            self.policy.host_copies.back()
        if report is None:
            return {}
        return {"sleep_freed_bytes": report.freed, "sleep_host_bytes": report.host}

    def _to_generator(self, tag: str) -> dict[str, float]:
        """The GPU's memory to the generator: optimizer out, then `tag` of the engine awake."""
        freed = host = 0
        with self.ledger("wake"):
            if self._offloads:
                freed, host = self.policy.host_copies.out()
            self.generator.wake(tag)
        return {"offload_freed_bytes": freed, "offload_host_bytes": host} if freed else {}

    # -- around the steps -------------------------------------------------------------------

    def evaluate(self) -> tuple[dict[str, float], str] | None:
        """Held-out pass@1 with the present weights."""
        options = self.config.eval
        if not self.held_out or not options.samples:
            return None
        sampling = dataclasses.replace(
            self.sampling,
            n=options.samples,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            logps=False,
        )
        self._to_generator("kv_cache")
        with self.ledger("evaluate"):
            graded = self.generate(
                self.held_out, sampling, seed=2**31 + self.done, scorer=self._held_out_scorer
            )
            rollouts = self.gather([group.result() for group in graded])
        folder = Path(self.config.run.folder)
        self._keep(folder / "rollouts" / f"eval_{self.done:06d}.jsonl", rollouts)
        return summarise(rollouts)

    def _keep(self, path: Path, rollouts: list[Rollout]) -> None:
        if self.world.is_main:
            write_rollouts(path, rollouts)

    def state(self) -> dict:
        return {"prompts": self.prompts.state(), "sampled_by": sampled_by(self.config, self.world)}

    def restore(self, state: dict) -> None:
        """Go on after the checkpoint that `state` is of.

        Graded rollouts of the step that was in work are taken up where they are what would be
        sampled again: from this checkpoint's weights, with the same prompts, options and seed.
        """
        self.prompts.restore(state["prompts"])
        self.done = state["step"]
        self.sync()
        if state.get("sampled_by") == sampled_by(self.config, self.world):
            path = step_file(self.config.run.folder, self.done + 1)
            # The generator's expert choice, where it is replayed, is not in the file.
            if self.config.experts.replay != "generator":
                self._interrupted = interrupted_rollouts(path, self.world, self.policy.version)
