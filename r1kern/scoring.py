"""`r1kern score`: score the completions of a file with a reward model in vLLM, write."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from r1kern import distributed
from r1kern.config import RewardModel
from r1kern.data.reading import Reads
from r1kern.data.tokenizer import load_tokenizer
from r1kern.errors import UserError
from r1kern.report.rollouts import read_rollouts, write_rollouts
from r1kern.rewards.model_terms import add_terms
from r1kern.train.reading_entry import read_reading

TERM = "reward_model"


def score_file(model: Path, rollouts: Path, *, out: Path, reads: Reads) -> str:
    """Write the rollouts with the term "reward_model", of weight 0; returns a line with its mean.

    Args:
        model: folder that `r1kern reward` left.
        rollouts: as `report.rollouts.write_rollouts` wrote it.
        reads: as in `data.reading.Reading`.

    Raises:
        UserError: the model or the file cannot be read.
    """
    if not rollouts.is_file():
        raise UserError(f"no such file: {rollouts} (give one that `r1kern rollout` wrote)")
    reading = read_reading(RewardModel(path=str(model), reads=reads))
    groups = read_rollouts(rollouts)
    samples = [(g.prompt.question, c.text) for g in groups for c in g.completions]
    sequences = reading.sequences(samples, load_tokenizer(model))
    world = distributed.start()
    from r1kern.generate.pooling import pooled_scores

    values = pooled_scores(
        model,
        [sequence.prompt_ids for sequence in sequences],
        dtype="float32" if world.device.type == "cpu" else "bfloat16",
        device=world.device.type,
    )
    remaining = iter(values)
    scores = [[{TERM: next(remaining)} for _ in group.completions] for group in groups]
    write_rollouts(out, add_terms(groups, scores, {TERM: 0.0}))
    return f"mean score {mean(values):.4f} of {len(values)} completions"
