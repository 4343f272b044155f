"""`r1kern rollout`: sample from a model folder with vLLM, grade, write."""

from __future__ import annotations

import shutil
from pathlib import Path

from r1kern import config, distributed
from r1kern.data.dataset import load_prompts
from r1kern.data.tokenizer import load_tokenizer
from r1kern.eval.heldout import summarise
from r1kern.report.rollouts import write_rollouts
from r1kern.rewards.score import score_rollouts


def sample_and_grade(
    model: Path,
    data: str,
    *,
    out: Path,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    template: str,
    limit: int,
    seed: int,
    generator: config.Generator,
    generator_tp: int = 1,
) -> str | None:
    """Write graded completions to `out` as JSONL; rank 0 returns a line with pass@1.

    Until `out` is whole, chunks lie in `OUT.parts`, where the same call goes on after a kill.

    Args:
        model: folder in Hugging Face format, weights included.
        data: as in `data.records.read_records`.
        samples: completions per problem.
        limit: first problems only; 0 takes all.
        generator, generator_tp: the engines of the world.

    Raises:
        UserError: the model or the data cannot be read.
    """
    from r1kern.hf.config import read_hf_config

    hf = read_hf_config(model)
    tokenizer = load_tokenizer(model)
    prompts = load_prompts(
        data, tokenizer=tokenizer, template=template, max_prompt_tokens=hf.max_position_embeddings
    )[: limit or None]
    world = distributed.start(seed=seed)
    from r1kern.eval.sampling import Sampler
    from r1kern.generate.engine import Sampling

    longest = max(len(p.ids) for p in prompts) + max_tokens
    parts = out.with_name(out.name + ".parts")
    sampler = Sampler(
        model, world, max_model_len=longest, generator=generator, generator_tp=generator_tp
    )
    sampled = sampler.sample(
        prompts,
        Sampling(n=samples, max_tokens=max_tokens, temperature=temperature, top_p=top_p),
        folder=parts,
        score=lambda rollouts: score_rollouts(rollouts, {"accuracy": 1.0, "format": 0.0}),
        seed=seed,
    )
    if not world.is_main:
        return None
    rollouts = list(sampled)
    write_rollouts(out, rollouts)
    shutil.rmtree(parts)
    if all(prompt.task == "general" for prompt in prompts):
        return f"{len(rollouts)} problems x {samples} samples, which no rule can judge"
    return summarise(rollouts, "pass@1")[1]
