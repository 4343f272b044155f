"""Other classes in a layer spec."""

from __future__ import annotations

import dataclasses


def substitute(spec, classes: dict[type, type]):
    """A layer spec with every class that is a key of `classes` replaced by its value.

    Args:
        spec: a class, or dataclasses and lists of specs (`ModuleSpec`, its submodules).
    """
    if isinstance(spec, type):
        return classes.get(spec, spec)
    if isinstance(spec, list | tuple):
        return type(spec)(substitute(item, classes) for item in spec)
    if dataclasses.is_dataclass(spec):
        changed = {
            field.name: substitute(getattr(spec, field.name), classes)
            for field in dataclasses.fields(spec)
            if field.init
        }
        return dataclasses.replace(spec, **changed)
    return spec
