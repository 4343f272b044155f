"""Graded rollouts on disk, one JSONL file a step."""

from __future__ import annotations

import json
from pathlib import Path

from r1kern.types import Completion, Prompt, Rollout, Score


class RolloutLog:
    """Writes `rollouts/NAME.jsonl` into a run folder, one line per completion."""

    def __init__(self, folder: str | Path, *, active: bool):
        self._folder = Path(folder) / "rollouts"
        self._active = active

    def write(self, name: int | str, rollouts: list[Rollout]) -> None:
        """Replace the file of `name`; a step is zero-padded."""
        if not self._active:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"step_{name:06d}" if isinstance(name, int) else name
        lines = [
            json.dumps(_record(group, rollout, i), ensure_ascii=False)
            for group, rollout in enumerate(rollouts)
            for i in range(len(rollout.completions))
        ]
        (self._folder / f"{stem}.jsonl").write_text("".join(line + "\n" for line in lines))


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
    """The groups of a file that `RolloutLog` wrote."""
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
