"""Graded rollouts on disk, as JSONL."""

from __future__ import annotations

import json
from pathlib import Path

from r1kern.types import Completion, Prompt, Rollout, Score


def write_rollouts(path: str | Path, rollouts: list[Rollout]) -> None:
    """One line per completion; `read_rollouts` gives back equal records.

    The file gets its name when it is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        for group, rollout in enumerate(rollouts):
            for i in range(len(rollout.completions)):
                record = _record(group, rollout, i)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    scratch.rename(path)


def _record(group: int, rollout: Rollout, index: int) -> dict:
    completion, score = rollout.completions[index], rollout.scores[index]
    return {
        "group": group,
        "weight_version": rollout.weight_version,
        "id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "prompt_ids": rollout.prompt.ids,
        "answer": rollout.prompt.answer,
        "question": rollout.prompt.question,
        "task": rollout.prompt.task,
        "language": rollout.prompt.language,
        "tests": rollout.prompt.tests,
        "completion": completion.text,
        "ids": completion.ids,
        "logps": completion.logps,
        "finish": completion.finish,
        "terms": score.terms,
        "total": score.total,
        "failure": score.failure,
    }


def read_rollouts(path: str | Path) -> list[Rollout]:
    """The groups of a file that `write_rollouts` wrote."""
    groups: dict[int, list[dict]] = {}
    with Path(path).open(encoding="utf-8", newline="\n") as file:
        for line in file:
            record = json.loads(line)
            groups.setdefault(record["group"], []).append(record)
    return [
        Rollout(
            prompt=_prompt(g[0]),
            completions=tuple(
                Completion(tuple(r["ids"]), tuple(r["logps"]), r["completion"], r["finish"])
                for r in g
            ),
            weight_version=g[0]["weight_version"],
            scores=tuple(Score(r["terms"], r["total"], r["failure"]) for r in g),
        )
        for g in groups.values()
    ]


def _prompt(record: dict) -> Prompt:
    return Prompt(
        record["id"],
        tuple(record["prompt_ids"]),
        record["answer"],
        record["prompt"],
        record["question"],
        record["task"],
        record["language"],
        tuple(record["tests"]),
    )


def step_file(folder: str | Path, step: int) -> Path:
    """Where a run keeps the rollouts of its `step`-th step, counted from 1."""
    return Path(folder) / "rollouts" / f"step_{step:06d}.jsonl"


def forget_rollouts(folder: str | Path, *, after: int) -> None:
    """Remove the files of steps beyond `after`, which an earlier process left."""
    for path in (Path(folder) / "rollouts").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > after:
            path.unlink()
