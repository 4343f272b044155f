"""Raw records of a data source, each with the place it came from (for error messages)."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from r1kern.errors import UserError

_KINDS = "a .jsonl, .json or .parquet file, a folder made by `save_to_disk`, bundled:NAME, or "
_KINDS += "hub:owner/name[:split]"


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        at: where it stands, "FILE:LINE" or "SOURCE[INDEX]".
        values: its fields.
    """

    at: str
    values: dict

    def text(self, field: str) -> str:
        """A field that must hold text which is not blank; UserError otherwise."""
        value = self._get(field)
        if not isinstance(value, str):
            raise UserError(f"{self.at}: field '{field}' must be text, not {_kind(value)}")
        if not value.strip():
            raise UserError(f"{self.at}: field '{field}' is blank: fill it in or drop the record")
        return value

    def scalar(self, field: str) -> str:
        """A field that holds text or a number, as text; UserError otherwise."""
        value = self._get(field)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return self.text(field)

    def items(self, field: str) -> list:
        """A field that holds a list which is not empty; UserError otherwise."""
        value = self._get(field)
        if not isinstance(value, list) or not value:
            found = "an empty one" if value == [] else _kind(value)
            raise UserError(
                f"{self.at}: field '{field}' must be a list with something in it, not {found}"
            )
        return value

    def _get(self, field: str) -> object:
        if field not in self.values:
            raise UserError(
                f"{self.at}: no field '{field}': add it, or name the right one among "
                f"{sorted(self.values)}"
            )
        return self.values[field]


def read_records(
    source: str | Path, *, where: Mapping[str, Iterable] | None = None
) -> list[Record]:
    """All records of a source; no network unless it starts with "hub:".

    Args:
        source: a path to a .jsonl, .json (an array) or .parquet file or to a folder made by
            `datasets`' `save_to_disk`; "bundled:NAME" for the files of this package;
            "hub:owner/name[:split]" for a data set of the Hugging Face Hub (split "train").
        where: keeps the records whose field has one of the values, for every field given.

    Raises:
        UserError: the source is missing, malformed or without records; the message has the place.
    """
    source = str(source)
    if source.startswith("bundled:"):
        records = _bundled(source)
    elif source.startswith("hub:"):
        records = _hub(source)
    else:
        records = _local(Path(source))
    if not records:
        raise UserError(f"{source} is empty: it needs at least one record")
    kept = [record for record in records if _matches(record, where or {})]
    if not kept:
        raise UserError(f"none of the {len(records)} records of {source} matches {dict(where)}")
    return kept


def _matches(record: Record, where: Mapping[str, Iterable]) -> bool:
    return all(record.scalar(field) in map(str, values) for field, values in where.items())


def _bundled(source: str) -> list[Record]:
    files = importlib.resources.files("r1kern.data") / "files"
    names = sorted(file.name[:-6] for file in files.iterdir() if file.name.endswith(".jsonl"))
    name = source.removeprefix("bundled:")
    if name not in names:
        raise UserError(f"no bundled data set '{name}': choose one of {names}")
    return _jsonl(source, (files / f"{name}.jsonl").read_bytes())


def _local(path: Path) -> list[Record]:
    readers: dict[str, Callable[[Path], list[Record]]] = {
        ".jsonl": lambda path: _jsonl(str(path), path.read_bytes()),
        ".json": _json_array,
        ".parquet": _parquet,
    }
    if path.is_dir():
        return _saved_folder(path)
    if not path.is_file():
        remote = "" if path.is_absolute() or len(path.parts) != 2 or path.suffix else str(path)
        hint = f"; to download it from the Hub write hub:{remote}" if remote else ""
        raise UserError(f"no such data file: {path} (give {_KINDS}{hint})")
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown kind of data file (give {_KINDS})")
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _jsonl(name: str, content: bytes) -> list[Record]:
    lines = enumerate(content.split(b"\n"), start=1)
    return [_object(f"{name}:{n}", _parse(name, line, n)) for n, line in lines if line.strip()]


def _json_array(path: Path) -> list[Record]:
    rows = _parse(str(path), path.read_bytes(), 1)
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold an array of objects, not {_kind(rows)}")
    return [_object(f"{path}[{i}]", row) for i, row in enumerate(rows)]


def _parse(name: str, text: bytes, first_line: int) -> object:
    at = f"{name}:{first_line}"
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{at}: not UTF-8 text: convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}:{first_line + error.lineno - 1}: malformed JSON (column {error.colno}: "
            f"{error.msg}): correct or remove it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at}: malformed JSON ({error}): correct or remove it") from error


def _object(at: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{at}: must be a JSON object, not {_kind(value)}")
    return Record(at, value)


def _parquet(path: Path) -> list[Record]:
    parquet = _import("pyarrow.parquet")
    try:
        rows = parquet.read_table(path).to_pylist()
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise UserError(f"{path}: not a parquet file ({_first_line(error)})") from error
    return [Record(f"{path}[{i}]", row) for i, row in enumerate(rows)]


def _saved_folder(path: Path) -> list[Record]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(str(p.parent) for p in path.glob("*/dataset_info.json"))
        raise UserError(f"{path} holds several splits: name one of {splits}")
    if not (path / "dataset_info.json").is_file():
        raise UserError(f"{path} is a folder without a saved data set (give {_KINDS})")
    datasets = _import("datasets")
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded: {_first_line(error)}: save it anew") from error
    return [Record(f"{path}[{i}]", row) for i, row in enumerate(rows)]


def _hub(source: str) -> list[Record]:
    name, _, split = source.removeprefix("hub:").partition(":")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"'{source}' is not of the form hub:owner/name[:split]")
    datasets = _import("datasets")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source} cannot be loaded: {_first_line(error)}: check the name, the split "
            "and the network"
        ) from error
    return [Record(f"{source}[{i}]", row) for i, row in enumerate(rows)]


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{error}: install it with `pip install datasets`") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
