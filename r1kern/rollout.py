"""`r1kern rollout`: sample from a model folder with vLLM, grade, write."""

from __future__ import annotations

from pathlib import Path

from r1kern import distributed
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
) -> str:
    """Write graded completions to `out` as JSONL; returns a line with pass@1.

    Args:
        model: folder in Hugging Face format, weights included.
        data: as in `data.records.read_records`.
        samples: completions per problem.
        limit: first problems only; 0 takes all.

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
    from r1kern.generate.engine import Generator, Sampling

    longest = max(len(p.ids) for p in prompts) + max_tokens
    generator = Generator(
        model,
        dtype="float32" if world.device.type == "cpu" else "bfloat16",
        max_model_len=longest,
        max_num_seqs=256,
        device=world.device.type,
        kv_cache_gib=1.0,
        tokenizer=tokenizer,
    )
    sampling = Sampling(
        n=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=(tokenizer.eos_token_id,),
    )
    rollouts = generator.generate(prompts, sampling, seed)
    rollouts = score_rollouts(rollouts, {"accuracy": 1.0, "format": 0.0})
    write_rollouts(out, rollouts)
    return summarise(rollouts)[1]
