"""People's part in the cold start: samples out as JSONL, decisions back in (section 2.3.1).

Each line of the exported file holds `id`, `problem`, `completion` and `decision`, which a person
sets to "accept" or "reject", or to "edit" with the better text in `edited`; "" is not decided yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from r1kern.data.records import read_records
from r1kern.errors import UserError
from r1kern.stages.actions import write_jsonl

DECISIONS = ("accept", "edit", "reject")


def export(path: Path, records: Iterable[Mapping]) -> Path:
    """Write records to be decided on; a file that is there, with its decisions, is left alone."""
    if path.is_file():
        return path
    return write_jsonl(path, ({**record, "decision": "", "edited": ""} for record in records))


def decided(path: Path) -> tuple[list[dict], Counter]:
    """The accepted and edited records of a reviewed file, and counts by decision.

    Raises:
        UserError: a record without a decision, an unknown one, or an edit without text.
    """
    kept, counts, open_ones = [], Counter(), []
    for record in read_records(path):
        decision = record.values.get("decision", "")
        if not decision:
            open_ones.append(record.at)
            continue
        if decision not in DECISIONS:
            raise UserError(
                f"{record.at}: decision '{decision}' is none of {', '.join(DECISIONS)}: correct it"
            )
        counts[decision] += 1
        if decision != "reject":
            text = record.text("edited" if decision == "edit" else "completion")
            rest = {k: v for k, v in record.values.items() if k not in ("decision", "edited")}
            kept.append({**rest, "completion": text})
    if open_ones:
        raise UserError(
            f"{len(open_ones)} records of {path} wait for a decision (the first: {open_ones[0]}): "
            "set it to accept, edit or reject and run the same command again"
        )
    if not kept:
        raise UserError(f"every record of {path} is rejected: accept or edit some")
    return kept, counts
