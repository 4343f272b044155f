"""Graded rollouts on disk, as JSONL."""

from __future__ import annotations

import json
from pathlib import Path

from r1kern.types import Completion, Prompt, Rollout, Score


def write_rollouts(path: str | Path, rollouts: list[Rollout]) -> None:
    """One line per completion; `read_rollouts` reads them back."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        for group, rollout in enumerate(rollouts):
            for i in range(len(rollout.completions)):
                record = _record(group, rollout, i)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _record(group: int, rollout: Rollout, index: int) -> dict:
    completion, score = rollout.completions[index], rollout.scores[index]
    return {
        "group": group,
        "weight_version": rollout.weight_version,
        "id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "prompt_ids": rollout.prompt.ids,
        "answer": rollout.prompt.answer,
        "completion": completion.text,
        "ids": completion.ids,
        "logps": [round(p, 6) for p in completion.logps],
        "finish": completion.finish,
        "terms": score.terms,
        "total": score.total,
        "failure": score.failure,
    }


def read_rollouts(path: str | Path) -> list[Rollout]:
    """The groups of a file that `write_rollouts` wrote."""
    groups: dict[int, list[dict]] = {}
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        groups.setdefault(record["group"], []).append(record)
    return [
        Rollout(
            prompt=Prompt(g[0]["id"], tuple(g[0]["prompt_ids"]), g[0]["answer"], g[0]["prompt"]),
            completions=tuple(
                Completion(tuple(r["ids"]), tuple(r["logps"]), r["completion"], r["finish"])
                for r in g
            ),
            weight_version=g[0]["weight_version"],
            scores=tuple(Score(r["terms"], r["total"], r["failure"]) for r in g),
        )
        for g in groups.values()
    ]
