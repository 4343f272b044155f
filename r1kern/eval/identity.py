"""Digests that tell one model folder, one set of options from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from r1kern.errors import UserError

BLOCKS, BLOCK_BYTES = 32, 16 << 10


def digest(value: object) -> str:
    """16 hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_identity(folder: Path) -> str:
    """A digest of a model folder's content, wherever it lies.

    Of a file over half a MiB 32 blocks, evenly spread, and the size are read: training changes
    weights everywhere, and terabytes are not to be read for a name.

    Raises:
        UserError: the folder holds no weights.
    """
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".model")]
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{folder} holds no weights (*.safetensors): give a folder that does")
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= BLOCKS * BLOCK_BYTES:
                total.update(file.read())
                continue
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
                total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()[:16]
