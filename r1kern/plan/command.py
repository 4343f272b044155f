"""`r1kern plan`: a plan as text, JSON and picture."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from rich.console import Console

from r1kern.config import TrainConfig
from r1kern.plan import picture as pictures
from r1kern.plan.layouts import nearest
from r1kern.plan.make import Plan, as_json, make_plan, model_as_built
from r1kern.plan.text import does_not_fit, show


def run(
    config: TrainConfig,
    *,
    json_file: Path | None = None,
    picture: Path | None = None,
    console: Console | None = None,
    **options,
) -> Plan:
    """Plan, print, write.

    Args:
        options: of `make.make_plan`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = make_plan(config, **options)
        found = [] if plan.fits else nearest(plan, model_as_built(config))
    show(plan, found, console or Console())
    if json_file is not None:
        data = as_json(plan) | {
            "does_not_fit": does_not_fit(plan),
            "nearest": [{"overrides": f.options(), "plan": as_json(f.plan)} for f in found],
        }
        json_file.write_text(json.dumps(data, indent=1))
    if picture is not None:
        pictures.draw(plan, picture)
    return plan
