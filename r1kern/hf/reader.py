"""Windows of a Hugging Face checkpoint's tensors, read shard by shard, FP8 restored on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from r1kern.hf.fp8_blocks import SCALE, dequantize
from r1kern.hf.headers import FP8, check, read_headers


@dataclass(frozen=True)
class Cut:
    """A part of a stored tensor and where it goes.

    Attributes:
        name: Hugging Face tensor.
        out: takes the values, of any float dtype and device.
        window: one slice with start and stop for each dimension.
    """

    name: str
    out: torch.Tensor
    window: tuple[slice, ...]


class HFReader:
    """A checkpoint in Hugging Face format: bf16, float32, or FP8 in 128 x 128 blocks.

    Args:
        folder: safetensors, with an index when there are several.
        hf: what `config.json` says; all names, shapes and dtypes are checked against it here,
            before the first byte of data is read.

    Raises:
        UserError: see `headers.read_headers` and `headers.check`.
    """

    def __init__(self, folder: str | Path, hf: PretrainedConfig):
        self.folder = Path(folder)
        self.stored = read_headers(folder)
        check(folder, self.stored, hf)

    def load(self, cuts: Iterable[Cut]) -> None:
        """Fill every cut, opening each file that is needed once, one at a time.

        Files are mapped, so that only the pages of the windows are read; at most the pages of one
        shard, and a second one when a scale lies apart from its weight, are held.
        """
        by_file = defaultdict(list)
        for cut in cuts:
            by_file[self.stored[cut.name].file].append(cut)
        for file in sorted(by_file):
            with self.shard(file) as shard:
                for cut in by_file[file]:
                    shard.copy(cut)

    def shard(self, file: str) -> Shard:
        """An open file, for use in `with`."""
        return Shard(self, file)


class Shard:
    """One open file of a reader."""

    def __init__(self, reader: HFReader, file: str):
        self._reader = reader
        self._file = file

    def __enter__(self) -> Shard:
        self._handle = safe_open(str(self._reader.folder / self._file), framework="pt")
        self._handle.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handle.__exit__(*error)

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it is stored: mapped, valid while the shard is open."""
        return self._handle.get_tensor(name)

    def scales(self, name: str) -> torch.Tensor:
        """Block scales of an FP8 weight of this shard, wherever they lie."""
        file = self._reader.stored[name + SCALE].file
        if file == self._file:
            return self.raw(name + SCALE).clone()
        with self._reader.shard(file) as other:
            return other.raw(name + SCALE).clone()

    def copy(self, cut: Cut) -> None:
        """Fill `cut.out`; FP8 weights are dequantised, only the rows and columns asked for."""
        values = self._handle.get_slice(cut.name)[cut.window]
        if self._reader.stored[cut.name].dtype != FP8:
            cut.out.copy_(values)
            return
        rows, columns = cut.window
        dequantize(
            values,
            self.scales(cut.name),
            cut.out,
            first_row=rows.start,
            first_column=columns.start,
        )
