"""What a folder holds, read with tolerance: of a running or killed run the whole part counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

LONGEST_LINE = 64 * 2**20  # bytes; a longer one is counted as broken, not read


class Broken:
    """Counts what could not be read, for the page to say."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}

    def add(self, path: Path) -> None:
        self.lines[path.name] = self.lines.get(path.name, 0) + 1

    def notes(self) -> list[str]:
        return [
            f"{name}: {count} line{'s' if count > 1 else ''} cut short or not JSON, left out"
            for name, count in sorted(self.lines.items())
        ]


def read_lines(path: Path, broken: Broken, *, limit: int | None = None) -> Iterator[dict]:
    """The JSON objects of a JSONL file, one a line.

    Args:
        limit: stop after so many bytes, at the end of a line.
    """
    if not path.is_file():
        return
    spent = 0
    with path.open("rb") as file:
        while limit is None or spent < limit:
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            spent += len(line)
            record = parse(line)
            if isinstance(record, dict):
                yield record
            elif line.strip():
                broken.add(path)


def parse(text: bytes) -> Any:
    """A JSON value, or None where `text` is none."""
    try:
        return json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):  # half a line; brackets nested without end
        return None


def read_json(path: Path) -> dict | None:
    """The object of a JSON file; None where there is no such file or it holds none."""
    value = parse(path.read_bytes()) if path.is_file() else None
    return value if isinstance(value, dict) else None


def read_config(path: Path) -> tuple[dict, str]:
    """A YAML file's mapping ({} where it is none) and its text."""
    if not path.is_file():
        return {}, ""
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return {}, text
    return (value if isinstance(value, dict) else {}), text


def number(value: object) -> float | None:
    """A finite number as float; None for anything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # an integer of 400 digits
        return None
    return value if math.isfinite(value) else None


def numbers(value: object) -> dict[str, float]:
    """The finite numbers of a mapping, by name."""
    pairs = [(str(k), number(v)) for k, v in mapping(value).items()]
    return {k: v for k, v in pairs if v is not None}


def mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def items(value: object) -> list:
    return value if isinstance(value, list) else []


def string(value: object) -> str:
    """A scalar as text; "" for None and for containers."""
    if isinstance(value, str):
        return value
    return "" if value is None or isinstance(value, dict | list) else str(value)


def spread(values: list, count: int) -> list:
    """`count` of `values`, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    if count == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
