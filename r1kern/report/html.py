"""`report.html`: one self-contained page of a run, a pipeline or an evaluation."""

from __future__ import annotations

import logging
from pathlib import Path

from r1kern.errors import UserError
from r1kern.report.metrics import METRICS
from r1kern.report.page.document import document
from r1kern.report.page.evaluation import RESULTS, evaluation_section
from r1kern.report.page.pipeline import PIPELINE, pipeline_tabs
from r1kern.report.page.run import run_section
from r1kern.report.page.run_data import is_run

log = logging.getLogger(__name__)

NAME = "report.html"


def write_report(folder: str | Path, out: str | Path | None = None) -> Path | None:
    """Write the page at the end of a run or pipeline, which it never makes fail.

    Args:
        folder, out: as `make_report` takes them.

    Returns:
        The page's path; None where it could not be made: a warning says why.
    """
    try:
        return make_report(folder, out)
    except Exception as error:  # whatever it is, the run it tells of is done and sound
        log.warning("r1kern: no report of %s: %s: %s", folder, type(error).__name__, error)
        return None


def make_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of what `folder` holds: `pipeline.json`, a run, or `results.json`.

    Files that a running or killed process left half-written are shown as far as they go.

    Args:
        out: the file to write; `folder`/report.html by default.

    Raises:
        UserError: there is no such folder, it holds none of the three, or `out` cannot be written.
    """
    folder = Path(folder)
    out = Path(out) if out is not None else folder / NAME
    page = _page(folder)
    scratch = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(page, encoding="utf-8")
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): name another file") from error
    return out


def _page(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name that of a run, a pipeline or an evaluation")
    title = folder.resolve().name
    try:
        if (folder / PIPELINE).is_file():
            name, tabs = pipeline_tabs(folder)
            return document(name or title, "Pipeline", tabs)
        tabs = []
        if (folder / METRICS).is_file() or (is_run(folder) and not (folder / RESULTS).is_file()):
            tabs.append(("Run", run_section(folder)))
        if (folder / RESULTS).is_file():
            tabs.append(("Evaluation", evaluation_section(folder)))
        if tabs:
            return document(title, tabs[0][0], tabs)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error}): look at its permissions") from error
    raise UserError(
        f"{folder} holds no run, pipeline or evaluation (no metrics.jsonl, config.yaml, {PIPELINE} "
        f"or {RESULTS}): name a folder that one wrote to"
    )
