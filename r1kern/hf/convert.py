"""`r1kern convert`: a Hugging Face folder in another dtype, file to file, without the model.

One tensor is in memory at a time, so that the 671B model converts on any machine with the disk for
it.  Finished shards wait in DST.partial: the same command, run again after a kill, goes on there.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from r1kern.errors import UserError
from r1kern.hf.config import read_hf_config
from r1kern.hf.dtype import ExportDtype, encode, stored_dtype
from r1kern.hf.fp8_blocks import SCALE, scale_shape
from r1kern.hf.headers import FP8
from r1kern.hf.reader import Cut, HFReader, Shard
from r1kern.hf.writer import (
    Spec,
    nbytes,
    publish,
    shard_names,
    write_companions,
    write_safetensors,
)

JOB = "convert.job.json"
Advance = Callable[[int], None]


def convert(source: Path, target: Path, dtype: ExportDtype) -> None:
    """Write the model in `source` to the new folder `target`, with its configuration and tokenizer.

    Tensors of multi-token-prediction layers are converted too; FP8 stays bit for bit for "fp8".

    Raises:
        UserError: `source` is not a whole model, `target` exists or holds another conversion's
            shards, or the disk is too small.
    """
    reader = HFReader(source, read_hf_config(source))
    plan = plan_shards(reader)
    scratch = target.with_name(target.name + ".partial")
    _claim(scratch, target, reader, dtype)
    todo = {file: names for file, names in plan.items() if not (scratch / file).is_file()}
    specs = {file: _specs(reader, names, dtype) for file, names in plan.items()}
    total = sum(nbytes(spec) for file in todo for spec in specs[file].values())
    _check_space(scratch, total)
    try:
        with _progress(total, done=len(plan) - len(todo), of=len(plan)) as advance:
            for file, names in todo.items():
                tensors = _tensors(reader, names, dtype, advance)
                write_safetensors(scratch / file, specs[file], tensors)
        write_companions(scratch, source, dtype, list(specs.values()))
    except OSError as error:
        raise UserError(
            f"{scratch} could not be written ({error}): free some space and run the same command "
            f"again, finished shards are kept"
        ) from error
    (scratch / JOB).unlink()
    publish(scratch, target)


def plan_shards(reader: HFReader) -> dict[str, list[str]]:
    """File to write -> tensors of it, scales apart: one file for each that holds any now."""
    by_source = defaultdict(list)
    for name, entry in reader.stored.items():
        if not name.endswith(SCALE):
            by_source[entry.file].append(name)
    groups = [by_source[file] for file in sorted(by_source)]
    return dict(zip(shard_names(len(groups)), groups, strict=True))


def _specs(reader: HFReader, names: list[str], dtype: ExportDtype) -> dict[str, Spec]:
    """What a file will hold."""
    specs: dict[str, Spec] = {}
    for name in names:
        shape = reader.stored[name].shape
        specs[name] = (stored_dtype(name, dtype), shape)
        if specs[name][0] == torch.float8_e4m3fn:
            specs[name + SCALE] = (torch.float32, scale_shape(shape))
    return specs


def _tensors(
    reader: HFReader, names: list[str], dtype: ExportDtype, advance: Advance
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file to write, which all lie in one file to read."""
    with reader.shard(reader.stored[names[0]].file) as shard:
        for name in names:
            for part, values in _converted(reader, shard, name, dtype):
                yield part, values
                advance(values.nbytes)


def _converted(
    reader: HFReader, shard: Shard, name: str, dtype: ExportDtype
) -> Iterator[tuple[str, torch.Tensor]]:
    entry, target = reader.stored[name], stored_dtype(name, dtype)
    if entry.dtype != FP8:
        yield from encode(name, shard.raw(name), dtype)
    elif target == torch.float8_e4m3fn:
        yield name, shard.raw(name)
        yield name + SCALE, shard.scales(name).float()
    else:
        out = torch.empty(entry.shape, dtype=target)
        shard.copy(Cut(name, out, tuple(slice(0, size) for size in entry.shape)))
        yield name, out


def _claim(scratch: Path, target: Path, reader: HFReader, dtype: ExportDtype) -> None:
    """Make the folder for finished shards, or find it made by this very conversion."""
    if target.exists():
        raise UserError(f"{target} exists: give a new name, or remove it")
    files = sorted({entry.file for entry in reader.stored.values()})
    stats = [(reader.folder / file).stat() for file in files]
    versions = [[f, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    job = json.dumps({"source": str(reader.folder.resolve()), "dtype": dtype, "files": versions})
    if not scratch.exists():
        scratch.mkdir(parents=True)
        (scratch / JOB).write_text(job)
    elif not (scratch / JOB).is_file() or (scratch / JOB).read_text() != job:
        raise UserError(
            f"{scratch} holds an unfinished conversion from other files or to another dtype: "
            f"remove it"
        )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 2**30:.1f} GiB more and the disk has {free / 2**30:.1f} GiB "
            f"free: make room or choose another place"
        )


@contextmanager
def _progress(total: int, *, done: int, of: int) -> Iterator[Advance]:
    """A bar with speed and remaining time over the bytes still to write."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    kept = f", {done} of {of} shards kept" if done else ""
    with Progress(*columns, speed_estimate_period=60) as progress:
        task = progress.add_task(f"converting{kept}", total=total)
        yield lambda count: progress.advance(task, count)
