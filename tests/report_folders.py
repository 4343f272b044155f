"""Folders for the tests of the report: a killed run full of hostile text, a pipeline."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from r1kern.report.rollouts import step_file, write_rollouts
from r1kern.types import Completion, Prompt, Rollout, Score

STEPS = 60
MISSING = (20, 21, 40)  # steps, from 1, without an entropy; 40 lacks its whole line
HOSTILE = (
    "</script><script>window.pwned=1</script><!-- ]]> </style></div></div>",
    "<img src=x onerror=window.pwned=2><svg onload=window.pwned=3><iframe src=//evil.test>",
    "\u202egnp.exe\u2066 \x00\x08\x1b[31m \ufeff\u200b &lt; &#60; {{7*7}} \ud800 \"'`",
)
LIMIT = 2_000_000  # bytes of a page


def metrics_of(step: int) -> dict:
    """A GRPO step as the log writes it, `step` from 1."""
    draw = random.Random(step)
    return {
        "step": step - 1,
        "reward": 0.3 + step / 100 + draw.uniform(-0.1, 0.1),
        "reward/accuracy": 0.2 + step / 100,
        f"reward/{HOSTILE[0]}": draw.random(),
        "response_length": 20.0 + step * 3,
        "entropy": None if step in MISSING else 1 / step,
        "mismatch": 10.0 ** -(step % 7 + 2) if step != 5 else 0.0,
        "max_mismatch": 0.5,
        "clip_fraction": draw.random() / 50,
        "grad_norm": draw.random(),
        "tokens": 5000.0,
        "tokens_per_s": 40_000.0 + step,
        "lr": 1e-4 * (1 - step / STEPS),
        "novel_metric": draw.gauss(0, 1),
        "host/rss_gib": 3.2,
        "host/available_gib": 9.0 - step / 100,
        "seconds/rollout": 2.0 + draw.random(),
        "seconds/update": 1.0,
        "seconds/step": 4.0,
    }


def write_run(folder: Path, *, steps: int = STEPS, texts=HOSTILE) -> Path:
    """A run that was killed while it wrote a line."""
    folder.mkdir(parents=True)
    lines = [json.dumps(metrics_of(s)) for s in range(1, steps + 1) if s != MISSING[-1]]
    for done in (0, steps // 2, steps):
        rate = 0.2 + 0.6 * done / steps
        held_out = {"eval/pass@1": rate, "eval/half_interval": 0.05, "eval/cons@8": rate + 0.1}
        lines.append(json.dumps({"step": done, **held_out, "seconds/evaluate": 1.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "rew')
    config = {"model": {"path": HOSTILE[1]}, "grpo": {}, "train": {"steps": 100}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (1, 2, steps):
        write_rollouts(step_file(folder, step), [group(i, texts, step) for i in range(4)])
    (folder / "rollouts" / "step_000003.jsonl").write_bytes(b'{"group": 0, "completion": "ha')
    return folder


def group(index: int, texts: tuple[str, ...], step: int) -> Rollout:
    """Completions with rewards 0, 1, 2 ...; they reflect once the run is late."""
    late = " Wait, let me re-check." if step > 2 else ""
    return Rollout(
        Prompt(
            f"p{index} {HOSTILE[1]}",
            (1,),
            HOSTILE[0],
            HOSTILE[2].encode("utf-8", "replace").decode(),
        ),
        tuple(Completion((1, 2), (), encodable(t + late), "length") for t in texts),
        step,
        tuple(Score({HOSTILE[1]: float(i)}, float(i), None) for i in range(len(texts))),
    )


def encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def stage(name: str, **more) -> dict:
    return {"name": name, "kind": "train", "state": "done", "seconds": 60, **more}


def write_pipeline(folder: Path) -> Path:
    write_run(folder / "zero")
    measured = {"pass@1": 0.25, "half_interval": 0.05, "problems": 100, "samples": 8}
    stages = [
        stage("zero", inputs={"base": "models/base"}, outputs={"model": "zero/model"}, run="zero"),
        stage(
            f"collect {HOSTILE[1]}",
            inputs={"generator": "zero/model"},
            outputs={"records": "a.jsonl"},
            counts={"sampled": 400, "kept": 100},
            dropped={HOSTILE[0]: 100, "wrong": 200},
            notes=[HOSTILE[1]],
        ),
        stage(
            "sft",
            inputs={"records": "a.jsonl", "teacher": "zero"},
            accuracy={"arith": measured},
            run="gone",
        ),
        {"name": "empty"},
        {},
        "no stage",
    ]
    (folder / "pipeline.json").write_text(json.dumps({"name": HOSTILE[0], "stages": stages}))
    return folder
