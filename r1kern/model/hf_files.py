"""A model folder in Hugging Face format: safetensors read by slices, written in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r1kern.errors import UserError

INDEX = "model.safetensors.index.json"


class SafetensorsReader:
    """Slices of named tensors from a folder of safetensors files, without reading the rest."""

    def __init__(self, folder: str | Path):
        """
        Raises:
            UserError: no safetensors in `folder`, or a file that is cut short.
        """
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            weight_map = json.loads((self.folder / INDEX).read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        else:
            files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{self.folder} holds no *.safetensors: give a folder with weights, or set "
                f"model.init=random to start from noise"
            )
        self._file_of = {}
        for name in files:
            try:
                handle = safe_open(str(self.folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self.folder / name} cannot be read ({error}): copy the file again"
                ) from error
            self._file_of |= dict.fromkeys(handle.keys(), handle)

    def __call__(self, name: str, split: int | None, rank: int, size: int) -> torch.Tensor:
        """See `weights.import_weights`.

        Raises:
            UserError: the tensor is not in the folder.
        """
        if name not in self._file_of:
            raise UserError(
                f"{self.folder} has no tensor '{name}': it is not a whole checkpoint "
                f"with one tensor per expert"
            )
        cut = self._file_of[name].get_slice(name)
        if split is None:
            return cut[:]
        rows = cut.get_shape()[split] // size
        window = slice(rank * rows, (rank + 1) * rows)
        return cut[window] if split == 0 else cut[:, window]


def write_model_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    like: str | Path,
    is_writer: bool,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write `tensors` with the configuration and tokenizer of the folder `like`.

    All ranks iterate `tensors` (the export is collective); one of them writes.  The folder appears
    under its name only when it is whole.

    Raises:
        OSError: the disk is full or not writable; nothing is left under the final name.
    """
    folder = Path(folder)
    scratch = folder.with_name(folder.name + ".tmp")
    if not is_writer:
        for _ in tensors:
            pass
        return
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in Path(like).iterdir():
        if path.suffix in {".json", ".txt", ".model", ".jinja"} and path.name != INDEX:
            shutil.copy(path, scratch / path.name)
    _complete_config(scratch / "config.json")
    _name_shards(scratch, list(_shards(tensors, shard_bytes, scratch)))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _complete_config(path: Path) -> None:
    """vLLM reads two routing fields that transformers leaves out of `config.json`."""
    config = json.loads(path.read_text())
    if config["model_type"] != "deepseek_v3":
        return
    config.setdefault("topk_method", "noaux_tc")
    config.setdefault("scoring_func", "sigmoid")
    config.setdefault("architectures", ["DeepseekV3ForCausalLM"])
    path.write_text(json.dumps(config, indent=2))


def _shards(tensors, shard_bytes: int, scratch: Path) -> Iterator[list[str]]:
    """Write tensors as they come, at most `shard_bytes` of them in memory; yield each's names."""
    held, size, number = {}, 0, 0
    for name, tensor in tensors:
        held[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.nbytes
        if size >= shard_bytes:
            save_file(held, scratch / f"shard-{number}", metadata={"format": "pt"})
            yield list(held)
            held, size, number = {}, 0, number + 1
    if held:
        save_file(held, scratch / f"shard-{number}", metadata={"format": "pt"})
        yield list(held)


def _name_shards(scratch: Path, shards: list[list[str]]) -> None:
    if len(shards) == 1:
        (scratch / "shard-0").rename(scratch / "model.safetensors")
        return
    weight_map, total = {}, 0
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (scratch / f"shard-{i}").rename(scratch / file)
        total += (scratch / file).stat().st_size
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (scratch / INDEX).write_text(json.dumps(index, indent=2))
