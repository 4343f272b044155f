"""YAML plus dotted overrides to checked options, and back."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from r1kern.config.sections import Section
from r1kern.errors import UserError

C = TypeVar("C", bound=Section)


def load_config(kind: type[C], path: str | Path, overrides: list[str] = ()) -> C:
    """Read a YAML file, apply `section.key=value` overrides, validate.

    Args:
        kind: `TrainConfig` or `SFTConfig`.
        path: YAML file.
        overrides: dotted keys with YAML values, e.g. `optim.lr=1e-5`.

    Raises:
        UserError: no such file, not YAML, and one line with *all* violations: unknown keys with
            the nearest name, wrong types, values out of range.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise UserError(f"no config file {path}" + (f": did you mean {near[0]}?" if near else ""))
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as 'model:', not a {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse_config(kind, raw, str(path))


def parse_config(kind: type[C], raw: dict, source: str = "config") -> C:
    """Validate a nested dictionary; see `load_config`."""
    try:
        return kind(**raw)
    except ValidationError as error:
        lines = [_violation(kind, e) for e in error.errors()]
        raise UserError(f"{source}: " + "; ".join(lines)) from error


def dump_config(config: Section) -> str:
    """The resolved options as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number (YAML 1.1 wants 1.0e-6)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _apply(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}' is not section.key=value")
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': '{section}' is not a section")
    node[last] = yaml.load(value, Loader=_Loader)


def _violation(kind: type[BaseModel], error: dict) -> str:
    """One pydantic error as `section.key: what is wrong`."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(_section(kind, error["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        return f"unknown key '{where}' ({hint})"
    if error["type"] == "missing":
        return f"'{where}' is required"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _section(kind: type[BaseModel], path: tuple) -> type[BaseModel]:
    """The section at a path, which may lead through dictionaries and optional sections."""
    at = kind
    for part in path:
        is_section = isinstance(at, type) and issubclass(at, BaseModel)
        at = at.model_fields[part].annotation if is_section else get_args(at)[1]
        if isinstance(at, UnionType):
            at = next(option for option in get_args(at) if option is not type(None))
    return at
