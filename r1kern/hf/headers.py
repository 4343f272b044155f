"""What a folder of safetensors holds, from its headers alone, and whether that is the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from r1kern.errors import UserError
from r1kern.hf.fp8_blocks import SCALE, scale_shape
from r1kern.hf.names import hf_shapes

INDEX = "model.safetensors.index.json"
FP8 = "F8_E4M3"
FLOATS = {"F32", "BF16", "F16"}
SHOWN = 3  # problems in one message


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: name of the shard in the folder.
        shape: of the tensor.
        dtype: by safetensors' name, e.g. "BF16", "F8_E4M3".
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a folder, by the index where there is one.

    Raises:
        UserError: no safetensors, an index that is not one, a shard that is missing, cut short or
            without a tensor that the index puts there, a tensor in two files.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return _indexed(folder, _weight_map(folder / INDEX))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} holds no *.safetensors: give a folder with weights, or set "
            f"model.init=random to start from noise"
        )
    stored: dict[str, Stored] = {}
    for file in files:
        for name, entry in _header(folder / file).items():
            if name in stored:
                raise UserError(
                    f"tensor '{name}' is in both {folder / stored[name].file} and {file}, and "
                    f"there is no {INDEX}: remove the file that does not belong here"
                )
            stored[name] = entry
    return stored


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a JSON index with a 'weight_map' "
            f"({type(error).__name__}: {error}): download it again"
        ) from error


def _indexed(folder: Path, weight_map: dict[str, str]) -> dict[str, Stored]:
    headers = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            names = [name for name, at in weight_map.items() if at == file]
            raise UserError(
                f"{folder / file} is missing, {INDEX} puts {len(names)} tensors there "
                f"('{names[0]}', ...): download it"
            )
        headers[file] = _header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(
                f"{folder / file} has no tensor '{name}', which {INDEX} puts there: download "
                f"both files again"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(str(path), framework="pt") as file:
            cuts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(path.name, tuple(cut.get_shape()), cut.get_dtype())
                for name, cut in cuts.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is cut short or not a safetensors file "
            f"({error}): download it again"
        ) from error


def check(folder: str | Path, stored: dict[str, Stored], hf: PretrainedConfig) -> None:
    """Compare names, shapes and dtypes with what the configuration asks for.

    Tensors of multi-token-prediction layers may be there or not.

    Raises:
        UserError: the first problems, each with file, tensor and remedy.
    """
    problems = [*_against_config(stored, hf), *_dtypes(stored), *_scales(stored)]
    if problems:
        more = len(problems) - SHOWN
        tail = f"; and {more} more" if more > 0 else ""
        raise UserError(f"{folder} does not hold the model: {'; '.join(problems[:SHOWN])}{tail}")


def _against_config(stored: dict[str, Stored], hf: PretrainedConfig) -> Iterator[str]:
    wanted, known = hf_shapes(hf), hf_shapes(hf, mtp=True)
    strange = [name for name in stored if name.removesuffix(SCALE) not in known]
    for name in strange:
        yield (
            f"'{name}' in {stored[name].file} is no tensor of a {hf.model_type} model with "
            f"{hf.num_hidden_layers} layers: take the config.json that belongs to these weights"
        )
    for name, shape in known.items():
        if name not in stored and name in wanted:
            yield f"'{name}' {list(shape)} is in no file: download the folder again"
        elif name in stored and stored[name].shape != shape:
            yield (
                f"'{name}' in {stored[name].file} is {list(stored[name].shape)}, config.json "
                f"asks for {list(shape)}: take the config.json that belongs to these weights"
            )


def _dtypes(stored: dict[str, Stored]) -> Iterator[str]:
    for name, entry in stored.items():
        if entry.dtype not in FLOATS and entry.dtype != FP8:
            yield (
                f"'{name}' in {entry.file} is {entry.dtype}, not one of "
                f"{', '.join(sorted(FLOATS))}, {FP8}: convert it to bf16 first"
            )


def _scales(stored: dict[str, Stored]) -> Iterator[str]:
    for name, entry in stored.items():
        if name.endswith(SCALE):
            weight = stored.get(name.removesuffix(SCALE))
            if weight is None or weight.dtype != FP8:
                found = "missing" if weight is None else weight.dtype
                yield (
                    f"'{name}' in {entry.file} scales '{name.removesuffix(SCALE)}', which is "
                    f"{found}, not {FP8}: the files are of two checkpoints, download them again"
                )
        elif entry.dtype == FP8:
            scale = stored.get(name + SCALE)
            if scale is None:
                yield (
                    f"'{name}' in {entry.file} is {FP8} and has no '{name + SCALE}': download "
                    f"the folder again, or dequantise with the tool that made it"
                )
            elif scale.shape != scale_shape(entry.shape):
                yield (
                    f"'{name + SCALE}' in {scale.file} is {list(scale.shape)}, blocks of 128 x 128 "
                    f"need {list(scale_shape(entry.shape))}: only those are understood"
                )
