"""Scores of a reward model by vLLM's pooling runner, as a server of it would give them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from r1kern.generate import host
from r1kern.generate.engine import build, environment, shut_down


def pooled_scores(
    model: str | Path,
    sequences: Sequence[Sequence[int]],
    *,
    dtype: str,
    device: str,
    kv_cache_gib: float = 1.0,
    max_num_seqs: int = 256,
) -> list[float]:
    """The score of each sequence, in order: the value of its last token.

    Builds an engine of one process and shuts it down again; `distributed.start` must have been
    called.

    Args:
        model: folder of a model with one label, such as `r1kern reward` leaves.
        sequences: token ids, the end-of-sequence token included (`Reading.sequences`).
        dtype: "float32", "bfloat16", ...
        device: "cpu" or "cuda".
        kv_cache_gib: size of the key-value cache.
        max_num_seqs: sequences read at the same time.

    Raises:
        UserError: (CPU) another vLLM is installed than the remedies were verified with.
    """
    config = AutoConfig.from_pretrained(model)
    arguments = dict(
        model=str(model),
        runner="pooling",
        dtype=dtype,
        max_model_len=max(map(len, sequences)),
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
        distributed_executor_backend="external_launcher",
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    with (
        host.environment(environment(config, Path(model).is_dir(), device)),
        host.quiet(),
        host.random_state(device),
        host.thread_control(),
    ):
        _, llm = build(arguments, device)
        try:
            outputs = llm.encode(
                [{"prompt_token_ids": list(ids)} for ids in sequences],
                pooling_task="classify",
                use_tqdm=False,
            )
            return [output.outputs.data.item() for output in outputs]
        finally:
            shut_down(llm)
