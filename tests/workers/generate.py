"""Worker: what `test_generate.py` judges, one function a scenario.

    torchrun generate.py FOLDER SCENARIO ...

vLLM shares its process and its process groups with the trainer and knows one parallel layout in a
process. Each scenario returns its measurements; rank 0 writes them to
FOLDER/SCENARIO.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
from datetime import timedelta
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from r1kern.errors import UserError
from r1kern.generate import Generator, Sampling, SyncError, sync, vllm_cpu
from r1kern.types import Prompt

STOP = 1
MAX_LEN = 160
SAMPLING = Sampling(n=4, max_tokens=32, stop_ids=(STOP,))
LOST = [
    "model.norm.weight",
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.2.mlp.experts.15.down_proj.weight",
]


def prompts(count: int = 8) -> list[Prompt]:
    gen = torch.Generator().manual_seed(7)
    return [
        Prompt(f"p{i}", tuple(torch.randint(3, 96, (5 + 13 * i,), generator=gen).tolist()), "", "")
        for i in range(count)
    ]


def build(folder: Path, **arguments) -> Generator:
    fields = dict(
        dtype="float32", max_model_len=MAX_LEN, max_num_seqs=64, device="cpu", kv_cache_gib=0.125
    )
    return Generator(folder, **{**fields, **arguments})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights(folder).items()}


def load(generator: Generator, folder: Path, version: int) -> sync.SyncReport:
    return generator.sync([weights(folder).items()], shapes(folder), version)


def tokens_and_logps(rollouts) -> list:
    return [[(list(c.ids), list(c.logps)) for c in rollout.completions] for rollout in rollouts]


@torch.no_grad()
def off_from_transformers(folder: Path, rollouts, temperature: float = 1.0) -> float:
    """Largest difference of a sampled log-probability from transformers', in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    for rollout in rollouts:
        start = len(rollout.prompt.ids) - 1
        for completion in rollout.completions:
            ids = torch.tensor([*rollout.prompt.ids, *completion.ids])
            logp = (model(ids[None]).logits[0, start:-1] / temperature).log_softmax(-1)
            sampled = logp.gather(-1, ids[start + 1 :, None])[:, 0]
            difference = (sampled - torch.tensor(completion.logps)).abs().max().item()
            worst = math.inf if math.isnan(difference) else max(worst, difference)
    return worst


def error_of(function, *arguments) -> str:
    try:
        function(*arguments)
    except (SyncError, UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextlib.contextmanager
def replaced(owner, name: str, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def vllm_model(generator: Generator):
    return generator._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def use_mla(generator: Generator) -> bool:
    return generator._llm.llm_engine.vllm_config.model_config.use_mla


def sampling_scenario(root: Path) -> dict:
    """Trainer's process state, log-probs, groups, seeds, stop ids, text."""
    out = {}
    os.environ["LOCAL_WORLD_SIZE"] = "7"
    environment, threads = dict(os.environ), torch.get_num_threads()
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    words = {f"w{i}": i for i in range(96)} | {"<bos>": 0, "</s>": STOP}
    words = {word: i for word, i in words.items() if word not in ("w0", "w1")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        bos_token="<bos>",
        eos_token="</s>",
    )
    generator = build(root / "a", tokenizer=tokenizer)
    out["latent"] = use_mla(generator)
    out["environment kept"] = environment == dict(os.environ)
    torch.set_num_threads(threads + 1)
    out["threads can be set"] = torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)

    first = generator.generate(prompts(), SAMPLING, seed=3)
    out["random states kept"] = (
        states[0] == random.getstate()
        and states[1] == numpy.random.get_state()[1].tolist()
        and torch.equal(states[2], torch.get_rng_state())
    )
    out["off"] = off_from_transformers(root / "a", first)
    torch.rand(5)
    finished = []
    again = generator.generate(
        prompts(), SAMPLING, seed=3, done=lambda place, group: finished.append((place, group))
    )
    out["told as they finish"] = sorted(finished, key=lambda f: f[0]) == list(enumerate(again))
    engine = generator._llm.llm_engine
    unfinished = []  # groups still in work whenever one is told
    generator.generate(
        prompts(4)[::-1],
        Sampling(n=4, max_tokens=32, stop_ids=tuple(range(3, 60))),
        seed=5,
        done=lambda place, group: unfinished.append(engine.has_unfinished_requests()),
    )
    out["told while others are decoded"] = unfinished
    other = generator.generate(prompts(), SAMPLING, seed=4)
    out["same seed"], out["other seed"] = first == again, first == other
    out["distinct"] = min(len({c.ids for c in rollout.completions}) for rollout in first)
    out["order"] = [rollout.prompt.id for rollout in first]
    out["completions"] = [
        (list(c.ids), len(c.logps), c.finish, c.text) for r in first for c in r.completions
    ]
    out["sampled"] = tokens_and_logps(first)
    out["too long"] = error_of(
        generator.generate, [Prompt("long", (5,) * (MAX_LEN - 10), "", "")], SAMPLING, 0
    )

    out["beyond the model"] = error_of(lambda: build(root / "a", max_model_len=257))

    warm = Sampling(n=4, max_tokens=16, temperature=0.6)
    out["off at T=0.6"] = off_from_transformers(
        root / "a", generator.generate(prompts(4), warm, seed=1), temperature=0.6
    )
    out["without logps"] = [
        len(c.logps)
        for c in generator.generate(prompts(1), Sampling(2, 4, logps=False), 0)[0].completions
    ]
    many = Sampling(n=4000, max_tokens=1, temperature=0.6, top_p=0.8)
    (group,) = generator.generate(prompts(1), many, seed=0)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in group.completions]), minlength=96)
    claimed = {c.ids[0]: math.exp(c.logps[0]) for c in group.completions}
    out["frequencies"] = [(counts[i].item() / 4000, p) for i, p in claimed.items()]

    report = load(generator, root / "b", 2)
    rollouts = generator.generate(prompts(), SAMPLING, seed=3)
    out["report"] = [report.version, report.written, report.bytes, report.seconds]
    out["updated"], out["version"] = tokens_and_logps(rollouts), rollouts[0].weight_version

    complete = weights(root / "a").items()
    partial = ((n, t) for n, t in complete if n != "model.layers.1.mlp.experts.3.up_proj.weight")
    out["left out"] = error_of(generator.sync, [partial], shapes(root / "a"), 6)
    out["after a failure"] = generator.version
    return out


def sync_scenario(root: Path) -> dict:
    """Fresh engines as the truth for updates, tensors lost in vLLM, vLLM without our remedies."""
    out = {}
    generator = build(root / "b")
    out["fresh"] = tokens_and_logps(generator.generate(prompts(), SAMPLING, seed=3))
    judge, verdicts = sync.check_received, []
    model = vllm_model(generator)
    load_weights = model.load_weights
    # the real audit speaks, and the update goes on as if it had not
    with replaced(sync, "check_received", lambda *a: verdicts.append(error_of(judge, *a))):
        for lost in LOST:
            model.load_weights = lambda tensors, lost=lost: load_weights(
                (n, t) for n, t in tensors if n != lost
            )
            load(generator, root / "a", 1)
    out["lost"] = verdicts
    model.load_weights = load_weights
    load(generator, root / "b", 2)
    out["whole again"] = tokens_and_logps(generator.generate(prompts(), SAMPLING, seed=3))
    with replaced(vllm_cpu, "forget_moe_kernels", lambda model: None):
        load(generator, root / "b", 3)
    rollouts = generator.generate(prompts(), SAMPLING, seed=3)
    out["off without the MoE remedy"] = off_from_transformers(root / "b", rollouts)
    generator.close()

    rope_left_on = {**vllm_cpu.engine_arguments(), "compilation_config": {"custom_ops": ["all"]}}
    judge, verdicts = vllm_cpu.check_rope, []
    with (
        replaced(vllm_cpu, "engine_arguments", lambda: rope_left_on),
        replaced(vllm_cpu, "check_rope", lambda model: verdicts.append(error_of(judge, model))),
    ):
        generator = build(root / "a")
    rollouts = generator.generate(prompts(), SAMPLING, seed=3)
    out["off without the rope remedy"] = off_from_transformers(root / "a", rollouts)
    out["rope left on"] = verdicts
    generator.close()

    generator = build(root / "b_yarn")
    fresh = generator.generate(prompts(), SAMPLING, seed=3)
    generator.close()
    out["off, yarn"] = off_from_transformers(root / "b_yarn", fresh)
    generator = build(root / "a_yarn", load_weights=False, prefix_caching=True)
    out["version without weights"] = generator.version
    load(generator, root / "a_yarn", 0)
    long, brief = [Prompt("long", tuple(range(3, 93)) + (7,) * 50, "", "")], Sampling(4, 8)
    generator.generate(long, brief, seed=3)
    load(generator, root / "b_yarn", 1)
    updated = generator.generate(prompts(), SAMPLING, seed=3)
    out["exact, yarn"] = tokens_and_logps(updated) == tokens_and_logps(fresh)
    out["off with a cached prefix"] = off_from_transformers(
        root / "b_yarn", generator.generate(long, brief, seed=3)
    )
    generator.close()

    # by now engines have been collected, the trainer's process groups must not be
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    out["groups alive"] = total.item() == torch.distributed.get_world_size()
    return out


def mla_scenario(root: Path) -> dict:
    """Latent attention with the published sizes."""
    out = {}
    for folder in (root / "mla", root / "mla_yarn"):
        generator = build(folder)
        fresh = generator.generate(prompts(), SAMPLING, seed=3)
        load(generator, root / "mla_other", 1)
        load(generator, folder, 2)
        updated = generator.generate(prompts(), SAMPLING, seed=3)
        out[folder.name] = {
            "latent": use_mla(generator),
            "off": off_from_transformers(folder, fresh),
            "exact": tokens_and_logps(fresh) == tokens_and_logps(updated),
        }
        generator.close()
    return out


def parallel_scenario(root: Path) -> dict:
    """One engine over two ranks."""
    generator = build(root / "a", tensor_parallel=2)
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = [line for line in maps if "/dev/shm/r1kern-" in line]
    assert shared, "the ranks of a tensor-parallel engine share memory"
    assert all(line.endswith("(deleted)") for line in shared), "a killed job would leave a file"
    out = {"a": tokens_and_logps(generator.generate(prompts(), SAMPLING, seed=3))}
    load(generator, root / "b", 1)
    out["off b"] = off_from_transformers(
        root / "b", generator.generate(prompts(), SAMPLING, seed=3)
    )
    return out


def main(root: Path, *scenarios: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    for scenario in scenarios:
        measured = globals()[f"{scenario}_scenario"](root)
        if torch.distributed.get_rank() == 0:
            (root / f"{scenario}.json").write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
