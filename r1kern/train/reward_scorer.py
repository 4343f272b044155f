"""Frozen reward models beside the policy, in its processes and its layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from transformers import PreTrainedTokenizerBase

from r1kern.config import Model, Parallel, RewardModel
from r1kern.data.reading import Reading
from r1kern.data.tokenizer import load_tokenizer
from r1kern.distributed import World
from r1kern.hf.config import read_hf_config
from r1kern.hf.dense import is_dense
from r1kern.train.assembly import assemble
from r1kern.train.packing import plan_batches
from r1kern.train.passes import score_batches
from r1kern.train.reading_entry import read_reading
from r1kern.types import Rollout, Sequence

log = logging.getLogger(__name__)

Scores = list[list[dict[str, float]]]
StepScores = list[list[dict[str, list[float]]]]


class RewardModels:
    """The reward models of a run, by the names of their reward terms.

    All ranks call every method together, with the same rollouts; each data-parallel replica scores
    its share of them.  A response that is too long for a model has no score of that model.

    Args:
        models: folders made by `r1kern reward`, or another model of one label whose `config.json`
            says how it reads: `"r1kern_reading": {"template": ...}`.
        world: the policy's.
        like: the policy's options, of which dtype, longest sequence and kernels are taken, not FP8.
        parallel: the policy's, of which the sizes are taken.
        tokens_per_microbatch: packed rows of one micro-batch.
        offload: the weights are in host memory but for the time of scoring (CUDA).

    Raises:
        UserError: a folder is no reward model, does not say how it reads, or cannot be laid out.
    """

    def __init__(
        self,
        models: Mapping[str, RewardModel],
        world: World,
        *,
        like: Model,
        parallel: Parallel,
        tokens_per_microbatch: int,
        offload: bool = True,
    ):
        self._models = {
            name: _Scorer(
                model,
                world,
                like=like,
                parallel=parallel,
                budget=tokens_per_microbatch,
                offload=offload and world.device.type == "cuda",
            )
            for name, model in models.items()
        }

    def score(self, rollouts: list[Rollout]) -> Scores:
        """For every rollout and completion the score by each model, in their order."""
        samples = _samples(rollouts)
        rows: list[dict[str, float]] = [{} for _ in samples]
        for name, model in self._models.items():
            sequences = model.reading.sequences(samples, model.tokenizer)
            for row, values in zip(rows, model.values(sequences, name), strict=True):
                if values is not None:
                    row[name] = values[-1]
        return _by_rollout(rows, rollouts)

    def step_scores(self, rollouts: list[Rollout]) -> StepScores:
        """For every rollout and completion each model's value after every step.

        Steps are the lines of what the model reads (`Reading.steps`); the last value is the score.
        """
        samples = _samples(rollouts)
        rows: list[dict[str, list[float]]] = [{} for _ in samples]
        for name, model in self._models.items():
            sequences, ends = zip(*model.reading.steps(samples, model.tokenizer), strict=True)
            found = model.values(list(sequences), name)
            for row, values, places in zip(rows, found, ends, strict=True):
                if values is not None:
                    row[name] = [values[place] for place in places]
        return _by_rollout(rows, rollouts)


def _samples(rollouts: list[Rollout]) -> list[tuple[str, str]]:
    """Problem and response of every completion."""
    assert all(rollout.prompt.question for rollout in rollouts), "a prompt without its problem"
    return [(r.prompt.question, c.text) for r in rollouts for c in r.completions]


def _by_rollout(rows: list, rollouts: list[Rollout]) -> list[list]:
    remaining = iter(rows)
    return [[next(remaining) for _ in rollout.completions] for rollout in rollouts]


class _Scorer:
    """One model: how it reads, and the values it gives."""

    reading: Reading
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        options: RewardModel,
        world: World,
        *,
        like: Model,
        parallel: Parallel,
        budget: int,
        offload: bool,
    ):
        self._world, self._offload = world, offload
        self.reading = read_reading(options)
        self.tokenizer = load_tokenizer(options.path, trust_remote_code=like.trust_remote_code)
        dense = is_dense(read_hf_config(options.path))
        own = {"path": options.path, "init": "load", "mtp_coef": 0.0}
        exact = {"precision": "dtype", "fp8_linears": False, "fp8_scales": "float32"}
        built = assemble(
            like.model_copy(update=own | exact),
            Parallel(tp=parallel.tp, pp=parallel.pp, ep=1 if dense else parallel.ep),
            world,
            scalar_head=True,
        )
        self._model, self._hf = built.model.requires_grad_(False), built.hf
        self._budget = budget
        self._longest = min(budget, like.max_positions)
        if offload:
            self._model.cpu()

    def values(self, sequences: list[Sequence], name: str) -> list[list[float] | None]:
        """The values at the rows of each sequence's completion; None where it is too long."""
        fits = [i for i, s in enumerate(sequences) if len(s) <= self._longest]
        if len(fits) < len(sequences):
            log.warning(
                "reward model '%s': %d of %d responses have more than %d tokens and no score",
                name,
                len(sequences) - len(fits),
                len(sequences),
                self._longest,
            )
        found: list[list[float] | None] = [None] * len(sequences)
        if fits:
            with self._on_device():
                values = self._run([sequences[i] for i in fits])
            for i, row in zip(fits, values, strict=True):
                found[i] = row
        return found

    def _run(self, sequences: list[Sequence]) -> list[list[float]]:
        world = self._world
        plan = plan_batches(
            sequences, budget=self._budget, dp=world.dp, multiple=world.tp, hf=self._hf
        )

        def score(batch, values):
            return values.index_select(0, batch.rows)

        batches = plan.batches(world.dp_rank, world.device)
        grids = score_batches(self._model, batches, score, world)
        sizes = [len(s.completion_ids) for s in sequences]
        found = torch.zeros(sum(sizes), device=world.device)
        places = found.split(sizes)
        for turn, grid in zip(plan.turns, grids, strict=True):
            for i, row in zip(turn[world.dp_rank], grid, strict=True):
                places[i].copy_(row[: sizes[i]])
        # exact: every other replica has 0 there
        dist.all_reduce(found, group=mpu.get_data_parallel_group())
        return [row.tolist() for row in found.cpu().split(sizes)]

    @contextmanager
    def _on_device(self):
        if not self._offload:
            yield
            return
        self._model.to(self._world.device)
        try:
            yield
        finally:
            self._model.cpu()
