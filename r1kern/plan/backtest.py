"""Published, measured steps beside what the model says of them: `python -m r1kern.plan.backtest`.

The plan's assumptions are the same for every row and none is fitted to one.  What is modelled is
*our* step at the published layout, lengths and batch; where the published system differs, `notes`
says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from r1kern.config import TrainConfig, parse_config
from r1kern.plan.make import Plan, make_plan

GB = 1e9


@dataclass(frozen=True)
class Published:
    """One published run of DeepSeek-V3 GRPO.

    Attributes:
        name, source: where the figures stand.
        world, hardware, options, prompt, response: the run, as far as it was published.
        measured: figure -> published value; seconds, or GB of a GPU or of a node's host.
        notes: how the published system differs from what is modelled.
    """

    name: str
    source: str
    world: int
    hardware: str
    options: dict
    prompt: float
    response: float
    measured: dict[str, float]
    notes: str


def _nemo(world: int) -> dict:
    return {
        "parallel": {
            "tp": 1, "pp": 16, "ep": 16, "layers": [3, *[4] * 14, 2], "generator_tp": 32,
            "world_size": world,
        },
        "rollout": {"prompts_per_step": 32, "group_size": 16, "max_tokens": 1024},
        "data": {"train": "none", "max_prompt_tokens": 512},
        "train": {"tokens_per_microbatch": 1536, "recompute": ["full"]},
        "generator": {"kv_cache_gib": 8},
    }  # fmt: skip


VERL = {
    "parallel": {
        "tp": 8, "pp": 12, "ep": 8, "layers": [*[5] * 11, 6], "generator_tp": 32, "world_size": 96,
    },
    "rollout": {"prompts_per_step": 96, "group_size": 8, "max_tokens": 9632},
    "data": {"train": "none", "max_prompt_tokens": 2048},
    "train": {"tokens_per_microbatch": 11680, "recompute": ["full"], "async_save": False},
    "generator": {"kv_cache_gib": 14},
    "optim": {"offload": True},
    "grpo": {"updates_per_batch": 3},
}  # fmt: skip

NEMO = "NeMo-RL 0.6 performance summary (docs.nvidia.com/nemo/rl)"
NEMO_NOTES = (
    "Lengths from the published tokens a second. One sequence a micro-batch. It also scores the "
    "old policy in a pass of its own."
)

ROWS = (
    Published(
        "NeMo-RL, 256 H100", NEMO, 256, "h100", _nemo(256), 111, 700, {"step": 134}, NEMO_NOTES
    ),
    Published(
        "NeMo-RL, 512 H100", NEMO, 512, "h100", _nemo(512), 111, 700, {"step": 111}, NEMO_NOTES
    ),
    Published(
        "verl, 96 H20",
        "verl docs/perf/dpsk.md",
        96,
        "h20",
        VERL,
        300,
        1960,
        {"step": 1700, "rollout": 1050, "GB of a GPU": 66, "GB of a host": 1500},
        "Mean prompt not published, taken as 300. Its weights leave the GPU during generation.",
    ),
)

LEFT_OUT = (
    "NeMo-RL, FP8 one-step-off, 512 H100, 59 s: generation overlaps training there, which this "
    "step does not do, so that it is not modelled."
)


@dataclass(frozen=True)
class Compared:
    """A published figure, the modelled one, and the relative error of the latter."""

    name: str
    figure: str
    measured: float
    modelled: float

    @property
    def error(self) -> float:
        return self.modelled / self.measured - 1


def compare(model: str | Path) -> list[Compared]:
    """Every published figure beside the modelled one.

    Args:
        model: folder with DeepSeek-V3's `config.json`.
    """
    compared = []
    for row in ROWS:
        plan = _plan(row, model)
        figures = _figures(plan)
        compared += [
            Compared(row.name, figure, value, figures[figure])
            for figure, value in row.measured.items()
        ]
    return compared


def _plan(row: Published, model: str | Path) -> Plan:
    longest = row.options["rollout"]["max_tokens"] + row.options["data"]["max_prompt_tokens"]
    raw = {**row.options, "model": {"path": str(model), "max_positions": longest}}
    raw["eval"] = {"samples": 0, "max_tokens": row.options["rollout"]["max_tokens"]}
    return make_plan(
        parse_config(TrainConfig, raw, row.name),
        hardware=row.hardware,
        prompt_tokens=row.prompt,
        response_tokens=row.response,
    )


def _figures(plan: Plan) -> dict[str, float]:
    return {
        "step": sum(plan.seconds.values()),
        "rollout": plan.seconds["rollout"],
        "GB of a GPU": plan.peak / GB,
        "GB of a host": plan.host_peak / GB,
    }


def table(compared: list[Compared]) -> str:
    """Markdown: published and measured, modelled, error."""
    units = {"step": "s", "rollout": "s"}
    lines = [
        "| run | figure | published, measured | ours, modelled | error |",
        "|---|---|---|---|---|",
    ]
    for c in compared:
        unit = units.get(c.figure, "GB")
        figure = c.figure.removeprefix("GB of ")
        lines.append(
            f"| {c.name} | {figure} | {c.measured:.0f} {unit} | {c.modelled:.0f} {unit} | "
            f"{c.error:+.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(compare(sys.argv[1])), end="")
