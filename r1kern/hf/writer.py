"""A model folder in Hugging Face format, written shard by shard and published whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from r1kern.errors import UserError
from r1kern.hf.dtype import ExportDtype, describe, encode
from r1kern.hf.headers import INDEX

# dtype -> safetensors' name of it
_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
Spec = tuple[torch.dtype, tuple[int, ...]]
Adapt = Callable[[dict], dict]


def nbytes(spec: Spec) -> int:
    dtype, shape = spec
    return dtype.itemsize * math.prod(shape)


def write_safetensors(
    path: Path, specs: dict[str, Spec], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write one file, a tensor at a time; it gets its name when it is whole and on disk.

    safetensors' own writer wants all tensors in memory at once.  Format: length of the header
    (8 bytes, little-endian), header in JSON, data without gaps
    (https://huggingface.co/docs/safetensors).

    Args:
        specs: dtype and shape by name.
        tensors: all of `specs`, in any order.

    Raises:
        OSError: the disk is full or not writable; no file is left.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide types first keep every tensor aligned, which readers that map the file need.
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
        begin, end = end, end + nbytes((dtype, shape))
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    partial = path.with_name(path.name + ".partial")
    left = set(specs)
    try:
        with partial.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, tensor in tensors:
                assert (tensor.dtype, tuple(tensor.shape)) == specs[name], name
                file.seek(8 + len(head) + header[name]["data_offsets"][0])
                file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
                left.remove(name)
            assert not left, left
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.rename(path)


def write_model_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    like: str | Path,
    is_writer: bool,
    dtype: ExportDtype,
    adapt: Adapt = dict,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write `tensors` with the configuration and tokenizer of the folder `like`.

    All ranks iterate `tensors` to the end (the export is collective), whatever befalls the one of
    them that writes.  That one holds a shard in memory.  The folder appears under its name only
    when it is whole.

    Args:
        adapt: makes the `config.json` that fits the tensors out of `like`'s.

    Raises:
        UserError: the disk is full or not writable, or a tensor cannot be stored so; nothing is
            left of the folder, one of that name from before stands.
    """
    tensors = iter(tensors)
    try:
        if is_writer:
            _write(Path(folder), tensors, Path(like), dtype, adapt, shard_bytes)
    except OSError as error:
        raise UserError(
            f"model {folder} could not be written ({error}): free some space or choose another "
            f"place"
        ) from error
    finally:
        for _ in tensors:
            pass


def _write(
    folder: Path, tensors, like: Path, dtype: ExportDtype, adapt: Adapt, shard_bytes: int
) -> None:
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        shards = []
        for held in _shards(tensors, dtype, shard_bytes):
            specs = {name: (t.dtype, tuple(t.shape)) for name, t in held.items()}
            write_safetensors(scratch / f"shard-{len(shards)}", specs, held.items())
            shards.append(specs)
        for i, file in enumerate(shard_names(len(shards))):
            (scratch / f"shard-{i}").rename(scratch / file)
        write_companions(scratch, like, dtype, shards, adapt)
        publish(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _shards(tensors, dtype: ExportDtype, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Encoded tensors, in groups that reach `shard_bytes`."""
    held, size = {}, 0
    for name, tensor in tensors:
        for part, values in encode(name, tensor.detach(), dtype):
            # The caller's next tensor may reuse the memory of this one.
            held[part] = values.to("cpu", copy=True)
            size += values.nbytes
        if size >= shard_bytes:
            yield held
            held, size = {}, 0
    if held:
        yield held


def shard_names(count: int) -> list[str]:
    """By the common pattern."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_companions(
    folder: Path,
    like: Path,
    dtype: ExportDtype,
    shards: list[dict[str, Spec]],
    adapt: Adapt = dict,
) -> None:
    """Index, configuration and tokenizer; `shards` are the specs of each file."""
    for path in like.iterdir():
        wanted = path.suffix in {".json", ".txt", ".model", ".jinja"}
        if wanted and not path.name.endswith(".index.json"):
            shutil.copy(path, folder / path.name)
    config = describe(json.loads((like / "config.json").read_text()), dtype)
    (folder / "config.json").write_text(json.dumps(_complete(adapt(config)), indent=2))
    if len(shards) > 1:
        weight_map, total = {}, 0
        for file, specs in zip(shard_names(len(shards)), shards, strict=True):
            weight_map |= dict.fromkeys(specs, file)
            total += sum(map(nbytes, specs.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _complete(config: dict) -> dict:
    """vLLM reads two routing fields that transformers leaves out of `config.json`."""
    if config["model_type"] != "deepseek_v3":
        return config
    routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    config = routing | {"architectures": ["DeepseekV3ForCausalLM"]} | config
    config.pop("auto_map", None)  # names Python files of the published folder, which stay there
    return config


def publish(scratch: Path, folder: Path) -> None:
    """Give a whole folder its name, in place of one that has it."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
