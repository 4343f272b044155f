"""DeepSeek-V3's published files in and out: bit for bit, in bounded memory, never damaged."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import published
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import TESTS, python, torchrun
from published import INDEX, QUANTISATION, write_published
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from r1kern import cli
from r1kern.hf.fp8_blocks import dequantize, is_quantised, quantize, scale_shape
from r1kern.types import Sequence

LAYOUTS = ["2,1,1", "1,2,1", "1,1,2"]
SCALE = "_scale_inv"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in FP8 and bf16 folders, as stored, and their values in float32."""
    root = tmp_path_factory.mktemp("published")
    fp8 = write_published(root / "fp8", fp8=True)
    write_published(root / "bf16", fp8=False)
    return root, fp8, published.restored(fp8)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors; the index, if there is one, says where each is."""
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    if len(shards) > 1:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        held = {name: file for file, tensors in shards.items() for name in tensors}
        assert weight_map == held
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(*(t.flatten().view(torch.uint8) for t in (a[name], b[name]))), name


def as_bf16(values: dict) -> dict[str, torch.Tensor]:
    return {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in values.items()
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# -- block quantisation -------------------------------------------------------------------------


def test_published_set():
    """Names and bytes sum to the published files': 91,991 tensors, 688,574,839,360 bytes."""
    config = DeepseekV3Config()
    tensors, size = 0, 0
    for name, shape in published.all_shapes(config).items():
        count = torch.Size(shape).numel()
        assert is_quantised(name) == published.in_fp8(name), name
        if is_quantised(name):
            tensors, size = tensors + 2, size + count + 4 * torch.Size(scale_shape(shape)).numel()
        else:
            wide = name.endswith("e_score_correction_bias")
            tensors, size = tensors + 1, size + count * (4 if wide else 2)
    assert (tensors, size) == (91_991, 688_574_839_360)


def test_quantised_as_by_blocks():
    gen = torch.Generator().manual_seed(1)
    for shape in [(128, 128), (1, 1), (300, 129), (127, 513)]:
        weight = torch.randn(shape, generator=gen)
        codes, scales = quantize(weight)
        wanted = published.quantise(weight)
        assert torch.equal(codes.float(), wanted[0].float()) and torch.equal(scales, wanted[1])
        out = torch.empty(shape)
        dequantize(codes, scales, out)
        assert torch.equal(out, published.dequantise(*wanted))
        # 4 significant bits at least in a normal code, steps of 2^-9 of the scale below
        bound = torch.maximum(weight.abs() / 16, expand(scales, weight) * 2**-10)
        assert ((out - weight).abs() <= bound * (1 + 1e-6)).all()


def expand(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Each weight's scale."""
    scales = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return scales[: like.shape[0], : like.shape[1]]


def test_zeros_tiny_and_damaged():
    weight = torch.zeros(130, 130)
    weight[129] = 1e-44
    codes, scales = quantize(weight)
    assert (codes.float() == 0).all() and torch.isfinite(scales).all()
    for bad in (torch.inf, torch.nan):
        weight[3, 129] = bad
        with pytest.raises(FloatingPointError):
            quantize(weight)


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    data=st.data(),
)
def test_window(seed, shape, data):
    """Any window restores as the same part of the whole."""
    codes, scales = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    whole = torch.empty(shape)
    dequantize(codes, scales, whole)
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    rows, columns = slice(*ends[0]), slice(*ends[1])
    out = torch.empty_like(whole[rows, columns])
    dequantize(codes[rows, columns], scales, out, first_row=rows.start, first_column=columns.start)
    assert torch.equal(out, whole[rows, columns])


@pytest.mark.parametrize(
    ("dtype", "moved"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)
def test_requantise_any_scales(dtype, moved):
    """Codes with 448 in each block come back; scales move by rounding at most, and once."""
    gen = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 0x7F, (700, 900), generator=gen, dtype=torch.uint8)
    codes = codes.view(torch.float8_e4m3fn)
    codes[::128, ::128] = 448
    scales = torch.rand(scale_shape(codes.shape), generator=gen) * 1e-3 + 1e-5
    first = requantise(codes, scales, dtype)
    assert torch.equal(first[0].float(), codes.float())
    exact = (448 * scales).to(dtype).float() / 448 == scales
    assert torch.equal(first[1][exact], scales[exact])
    assert ((first[1] - scales).abs() <= moved * scales).all() and not exact.all()
    second = requantise(*first, dtype)
    assert torch.equal(second[0].float(), codes.float()) and torch.equal(second[1], first[1])


def requantise(codes, scales, dtype):
    values = torch.empty(codes.shape, dtype=dtype)
    dequantize(codes, scales, values)
    return quantize(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_requantise_every_tensor(files, dtype):
    """Weights that were bf16 before FP8: codes, scales and values are bit-equal after a round."""
    _, stored, _ = files
    names = [name for name in stored if is_quantised(name)]
    assert len(names) == 72
    for name in names:
        again = requantise(stored[name], stored[name + SCALE], dtype)
        assert torch.equal(again[0].float(), stored[name].float()), name
        assert torch.equal(again[1], stored[name + SCALE]), name
        values = [torch.empty(stored[name].shape, dtype=dtype) for _ in range(2)]
        dequantize(stored[name], stored[name + SCALE], values[0])
        dequantize(*again, values[1])
        assert torch.equal(*values), name


def test_requantise_float32_weights():
    """Through float32 everything comes back whatever the weights were: 40,000 blocks' scales."""
    gen = torch.Generator().manual_seed(4)
    amax = torch.rand(40_000, generator=gen) * 10.0 ** torch.randint(
        -9, 3, (40_000,), generator=gen
    )
    weight = torch.zeros(1, 128 * len(amax))
    weight[0, ::128] = amax
    weight[0, 1::128] = amax * torch.rand(len(amax), generator=gen)
    codes, scales = quantize(weight)
    again = requantise(codes, scales, torch.float32)
    assert torch.equal(again[0].float(), codes.float()) and torch.equal(again[1], scales)


# -- through Megatron ---------------------------------------------------------------------------


def test_parallel_import_and_export(files, tmp_path):
    """TP2, EP2, PP2 hold slices of the truth; what they save, MTP carried, is what went in."""
    root, stored, values = files
    whole = as_bf16(values)
    save_file(whole, tmp_path / "truth.safetensors")
    worker = TESTS / "workers" / "hf_files.py"
    torchrun(2, worker, root / "fp8", tmp_path / "truth.safetensors", tmp_path, *LAYOUTS)
    for layout in LAYOUTS:
        same(load_folder(tmp_path / f"{layout}_bf16"), whole)
        same(load_folder(tmp_path / f"{layout}_fp8"), stored)
    assert "quantization_config" not in config_of(tmp_path / f"{LAYOUTS[0]}_bf16")
    assert config_of(tmp_path / f"{LAYOUTS[0]}_fp8")["quantization_config"] == QUANTISATION


@pytest.mark.full
def test_import_holds_two_shards_at_most(tmp_path):
    """12 shards of 16 MiB: the peak over the parameters stays under two of them."""
    shards, per_shard = 12, 16 << 20
    config = published.ragged_config(
        hidden_size=512,
        moe_intermediate_size=1024,
        n_routed_experts=128,
        num_hidden_layers=2,
        num_mtp_layers=0,
    )
    gen = torch.Generator().manual_seed(3)
    stored, files, size = {}, {}, 0
    for name, shape in published.all_shapes(config).items():
        new = {name: torch.randn(shape, generator=gen).bfloat16()}
        if published.in_fp8(name):
            codes = torch.randint(1, 0x7F, shape, generator=gen, dtype=torch.uint8)
            new = {
                name: codes.view(torch.float8_e4m3fn),
                name + SCALE: torch.ones(scale_shape(shape)),
            }
        stored |= new
        files |= dict.fromkeys(new, min(size // per_shard, shards - 1))
        size += sum(t.nbytes for t in new.values())
    assert size > 0.99 * shards * per_shard
    published.write_shards(tmp_path, stored, files, shards)
    published.write_config(tmp_path, config, fp8=True)
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    done = python(TESTS / "workers" / "import_memory.py", tmp_path)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    growth, untouched = map(int, re.search(r"growth=(\d+) untouched=(\d+)", done.stdout).groups())
    assert untouched == 0
    assert growth < 2 * largest, f"{growth / 2**20:.1f} MiB over, shards of {largest / 2**20:.1f}"


# -- file to file -------------------------------------------------------------------------------


def test_convert(files, tmp_path, capfd):
    """Each pair of dtypes; MTP tensors, tokenizer and configuration come along."""
    root, stored, values = files
    wanted = {
        "bf16": as_bf16(values),
        "fp8": stored,
        "fp32": {n: t.float() for n, t in values.items()},
    }
    for dtype, tensors in wanted.items():
        assert cli.run(["convert", str(root / "fp8"), str(tmp_path / dtype), "--dtype", dtype]) == 0
        same(load_folder(tmp_path / dtype), tensors)
        assert len(list((tmp_path / dtype).glob("*.safetensors"))) == 5
        assert (tmp_path / dtype / "tokenizer.json").is_file()
    assert "quantization_config" not in config_of(tmp_path / "bf16")
    assert config_of(tmp_path / "fp8")["quantization_config"] == QUANTISATION
    again = tmp_path / "again"
    assert cli.run(["convert", str(tmp_path / "bf16"), str(again), "--dtype", "fp8"]) == 0
    same(load_folder(again), stored)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.float32)
    for name in ("lm_head.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert torch.equal(model.state_dict()[name], wanted["fp32"][name])


KILLED = """
import os, signal, sys
from pathlib import Path
from r1kern.hf import convert
write, left = convert.write_safetensors, [2]
def write_or_die(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(*arguments)
convert.write_safetensors = write_or_die
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), "bf16")
"""


def test_convert_goes_on_after_kill(files, tmp_path, capfd):
    root, _, values = files
    source, target = root / "fp8", tmp_path / "bf16"
    done = python("-c", KILLED, source, target)
    assert done.returncode == -signal.SIGKILL and not target.exists()
    finished = {p.name: p.stat().st_ino for p in tmp_path.glob("*.partial/*.safetensors")}
    assert len(finished) == 2
    refused(capfd, ["convert", source, target, "--dtype", "fp8"], "bf16.partial", "remove it")
    assert cli.run(["convert", str(source), str(target)]) == 0
    same(load_folder(target), as_bf16(values))
    assert finished.items() <= {p.name: p.stat().st_ino for p in target.iterdir()}.items()
    assert not list(tmp_path.glob("*.partial")) and not list(target.glob("*.json.*"))
    refused(capfd, ["convert", source, target], "exists", "remove it")


def test_full_disk(files, tmp_path, capfd):
    """Nothing under the final name, finished shards kept; a model folder of before stands."""
    root, _, values = files
    command = ["convert", str(root / "fp8"), str(tmp_path / "fp32"), "--dtype", "fp32"]
    sizes = sorted(p.stat().st_size for p in (root / "fp8").glob("*.safetensors"))
    with largest_file(3 * sizes[-1]):
        refused(capfd, command, "File too large", "free some space")
    assert not (tmp_path / "fp32").exists() and not list(tmp_path.rglob("*.safetensors.partial"))
    assert cli.run(command) == 0

    from r1kern.errors import UserError
    from r1kern.hf.writer import write_model_folder

    def export(seen):
        for name, tensor in values.items():
            yield name, tensor
            seen.append(name)

    folder, seen = tmp_path / "model", []
    options = dict(like=root / "fp8", is_writer=True, dtype="bf16", shard_bytes=1 << 20)
    write_model_folder(folder, export([]), **options)
    before = load_folder(folder)
    with largest_file(1 << 19), pytest.raises(UserError, match="free some space"):
        write_model_folder(folder, export(seen), **options)
    assert seen == list(values)  # the collective export ran to its end
    same(load_folder(folder), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp32", "model"]


@contextmanager
def largest_file(size: int):
    """Writing past `size` bytes of a file fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_convert_checkpoint(files, tmp_path, capfd):
    """A checkpoint after an update: its weights, not those that the run began with."""
    from r1kern import distributed
    from r1kern.config import Data, Model, Optim, Parallel, SFTConfig, dump_config

    world = distributed.start()
    from r1kern.train.checkpoint import Checkpoints
    from r1kern.train.packing import pack
    from r1kern.train.policy import Policy
    from r1kern.train.sft import sft_loss

    root, _, values = files
    model = Model(path=str(root / "fp8"))
    policy = Policy(model, Parallel(), Optim(lr=1e-2), world, total_updates=9)
    batches = pack([Sequence((5, 6, 7), (8, 9, 1))], budget=64, dp=1, dp_rank=0)
    policy.update(batches, partial(sft_loss, num_tokens=3))
    wanted = {name: tensor.clone() for name, tensor in policy.export()}
    Checkpoints(tmp_path, keep_last=1).save(policy, 3, {})
    (tmp_path / "config.yaml").write_text(dump_config(SFTConfig(model=model, data=Data(train="-"))))
    step, target = tmp_path / "checkpoints" / "step_000003", tmp_path / "hf"
    assert cli.run(["convert", str(step), str(target)]) == 0
    same(load_folder(target), wanted)
    assert not torch.equal(wanted["lm_head.weight"], values["lm_head.weight"])
    refused(capfd, ["convert", step, target], "exists", "remove it")
    os.truncate(next(step.glob("*.distcp")), 100)
    refused(capfd, ["convert", step, tmp_path / "new"], "step_000003", "convert the one before")
    (tmp_path / "config.yaml").unlink()
    refused(capfd, ["convert", step, tmp_path / "new"], "config.yaml is missing")
    distributed.shutdown()


# -- bad input ----------------------------------------------------------------------------------

Q_B = "model.layers.1.self_attn.q_b_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def edit(folder: Path, change) -> None:
    """`change(tensors)` in the shard of each tensor it names; the index follows."""
    index = json.loads((folder / INDEX).read_text())
    tensors = load_folder(folder)
    files = {name: int(file[6:11]) - 1 for name, file in index["weight_map"].items()}
    for name, new in change(tensors).items():
        if new is None:
            del tensors[name], files[name]
        else:
            tensors[name] = new
            files.setdefault(name, 0)
    published.write_shards(folder, tensors, files, 5)


def edit_config(folder: Path, **fields) -> None:
    config = config_of(folder)
    for key, value in fields.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def truncate(folder):
    path = shard(folder, Q_B)
    os.truncate(path, path.stat().st_size - 100)


def lose_from_header(folder):
    path = shard(folder, Q_B)
    save_file({name: t for name, t in load_file(path).items() if name != Q_B}, path)


BAD = {
    "truncated shard": (truncate, ["-of-000005.safetensors", "cut short", "download it again"]),
    "pointer of git-lfs": (
        lambda f: shard(f, Q_B).write_text("version https://git-lfs.github.com/spec/v1\n"),
        ["-of-000005.safetensors", "not a safetensors file", "download it again"],
    ),
    "missing shard": (
        lambda f: shard(f, Q_B).unlink(),
        ["-of-000005.safetensors is missing", INDEX, "download it"],
    ),
    "index and shard differ": (lose_from_header, [Q_B, INDEX, "download both"]),
    "missing tensor": (
        lambda f: edit(f, lambda t: {NORM: None}),
        [f"'{NORM}' [192] is in no file", "download the folder again"],
    ),
    "wrong shape": (
        lambda f: edit(f, lambda t: {NORM: torch.ones(64).bfloat16()}),
        [f"'{NORM}' in model-00001-of-000005.safetensors is [64]", "asks for [192]", "config.json"],
    ),
    "scale without weight": (
        lambda f: edit(f, lambda t: {Q_B: None}),
        [f"'{Q_B}' [160, 96] is in no file", f"'{Q_B}{SCALE}'", "which is missing"],
    ),
    "scale of a bf16 weight": (
        lambda f: edit(f, lambda t: {Q_B: t[Q_B].bfloat16()}),
        [f"'{Q_B}{SCALE}' in model-", f"scales '{Q_B}', which is BF16", "download them again"],
    ),
    "weight without scale": (
        lambda f: edit(f, lambda t: {Q_B + SCALE: None}),
        [f"'{Q_B}' in model-", f"has no '{Q_B}{SCALE}'", "download the folder again"],
    ),
    "scale of wrong shape": (
        lambda f: edit(f, lambda t: {Q_B + SCALE: torch.ones(2, 2)}),
        [f"'{Q_B}{SCALE}' in model-", "is [2, 2]", "need [2, 1]"],
    ),
    "integers": (
        lambda f: edit(f, lambda t: {NORM: torch.ones(192, dtype=torch.int32)}),
        [f"'{NORM}' in model-00001-of-000005.safetensors is I32", "convert it to bf16"],
    ),
    "tensors of another model": (
        lambda f: edit(f, lambda t: {"transformer.h.0.attn.c_attn.weight": torch.ones(2)}),
        ["'transformer.h.0.attn.c_attn.weight' in model-00001", "no tensor of a deepseek_v3"],
    ),
    "layer too many": (
        lambda f: edit_config(f, num_nextn_predict_layers=0),
        ["'model.layers.2.", "with 2 layers", "; and 73 more"],
    ),
    "index not JSON": (
        lambda f: (f / INDEX).write_text("{"),
        [f"{INDEX} is not a JSON index", "download it again"],
    ),
    "index without map": (
        lambda f: (f / INDEX).write_text("{}"),
        [f"{INDEX} is not a JSON index with a 'weight_map'", "download it again"],
    ),
    "other architecture": (
        lambda f: edit_config(f, model_type="gpt2"),
        ["config.json: model_type is 'gpt2'", "deepseek_v3"],
    ),
    "unknown architecture": (
        lambda f: edit_config(f, model_type="nonesuch"),
        ["config.json", "nonesuch"],
    ),
    "config not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json is not JSON", "download it again"],
    ),
    "config without type": (
        lambda f: edit_config(f, model_type=None),
        ["config.json has no 'model_type'", "Hugging Face format"],
    ),
    "config lacks fields": (
        lambda f: edit_config(f, kv_lora_rank=None, hidden_size=None),
        ["config.json lacks hidden_size, kv_lora_rank", "add what the weights were made with"],
    ),
    "config of wrong type": (
        lambda f: edit_config(f, hidden_size="wide"),
        ["config.json", "hidden_size", "expected int"],
    ),
    "other quantisation": (
        lambda f: edit_config(f, quantization_config={"quant_method": "awq"}),
        ["config.json: quantization_config", "awq", "bf16 version"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, files, tmp_path, capfd):
    root, _, _ = files
    damage, words = BAD[case]
    folder = tmp_path / "damaged"
    shutil.copytree(root / "fp8", folder)
    damage(folder)
    refused(capfd, ["convert", folder, tmp_path / "out"], *words)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_written_files_are_aligned(tmp_path):
    """Odd sizes of FP8 before wider types: every tensor starts where its type can be mapped."""
    from r1kern.hf.writer import write_safetensors

    tensors = {
        "a": torch.ones(3, 7).to(torch.float8_e4m3fn),
        "b": torch.arange(5).bfloat16(),
        "c": torch.arange(3).float(),
        "d": torch.ones(()),
        "e": torch.ones(0, 4),
    }
    path = tmp_path / "x.safetensors"
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(path, specs, tensors.items())
    same(load_file(path), tensors)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    for name, tensor in tensors.items():
        assert (8 + size + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_file_without_index(files, tmp_path, capfd):
    """One file, and two files with the same tensor."""
    root, stored, _ = files
    (tmp_path / "one").mkdir()
    save_file(stored, tmp_path / "one" / "model.safetensors")
    shutil.copy(root / "fp8" / "config.json", tmp_path / "one")
    assert cli.run(["convert", str(tmp_path / "one"), str(tmp_path / "fp8"), "--dtype=fp8"]) == 0
    same(load_folder(tmp_path / "fp8"), stored)
    save_file({NORM: stored[NORM]}, tmp_path / "one" / "other.safetensors")
    command = ["convert", tmp_path / "one", tmp_path / "out"]
    refused(capfd, command, NORM, "model.safetensors and other.safetensors", "remove the file")
    refused(capfd, [*command, "--dtype", "int8"], "--dtype int8", "bf16, fp32, fp8")


def refused(capfd, arguments, *words) -> None:
    """Exit code 2 and one line on stderr that holds `words`."""
    capfd.readouterr()
    assert cli.run([str(a) for a in arguments]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "r1kern: error" in line]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
