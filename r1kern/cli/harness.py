"""The command that runs lm-eval's tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from r1kern.cli.application import app


@app.command("lm-eval")
def lm_eval(
    model: Annotated[Path, typer.Argument(help="folder in Hugging Face format")],
    tasks: Annotated[str, typer.Option(help="names of lm-eval's tasks, comma-separated")],
    include_path: Annotated[Path | None, typer.Option(help="folder of further task YAMLs")] = None,
    limit: Annotated[int, typer.Option(help="first problems only; 0: all")] = 0,
    fewshot: Annotated[int | None, typer.Option(help="examples; default: the task's")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="apply the chat template")] = False,
    max_tokens: Annotated[int, typer.Option(help="of a completion without a budget")] = 1024,
    max_length: Annotated[int, typer.Option(help="of prompt and completion; 0: model's")] = 0,
    hub: Annotated[bool, typer.Option("--hub", help="allow downloads from the hub")] = False,
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("lm_eval.json"),
    seed: int = 0,
) -> None:
    """Run tasks of lm-eval through vLLM in this process; reasoning is not shown to the task."""
    if not hub:  # read when the libraries are imported
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from r1kern.eval import harness

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    loaded = harness.load_data(harness.load_tasks(names, include_path), names)

    from r1kern import distributed
    from r1kern.data.tokenizer import load_tokenizer
    from r1kern.hf.config import read_hf_config

    longest = max_length or read_hf_config(model).max_position_embeddings
    tokenizer = load_tokenizer(model)
    world = distributed.start(seed=seed)
    generator = harness.Generator(
        model,
        dtype="float32" if world.device.type == "cpu" else "bfloat16",
        max_model_len=longest,
        max_num_seqs=256,
        device=world.device.type,
        kv_cache_gib=1.0,
        tokenizer=tokenizer,
    )
    answers = harness.HarnessModel(
        generator, tokenizer, max_length=longest, max_tokens=max_tokens, seed=seed
    )
    results = harness.evaluate(
        answers,
        loaded,
        out=out,
        limit=limit or None,
        num_fewshot=fewshot,
        apply_chat_template=chat,
    )
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                print(f"{task} {name}: {value:.4f}")
    print(f"samples: {out}")
