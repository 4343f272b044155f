"""Whole runs on two gloo ranks with real Megatron-core and real vLLM."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
import torch
from launch import ROOT, TESTS, command, environment, genuine_torchrun, torchrun
from safetensors.torch import load_file
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.hf.convert import convert
from r1kern.report.metrics import read_metrics
from r1kern.report.rollouts import read_rollouts

WORKER = TESTS / "workers" / "train.py"
CONFIG = ROOT / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that speaks the demo's tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_demo_tokenizer()
    write_tiny_model(
        folder,
        seed=3,
        num_hidden_layers=4,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=128,
    )
    tokenizer.save_pretrained(folder)
    return folder


def arguments(model, folder, *more) -> list[str]:
    """A short GRPO run in which random completions earn uneven rewards."""
    return [
        str(CONFIG),
        f"model.path={model}",
        f"run.folder={folder}",
        "rewards={variety: 1.0, accuracy: 1.0}",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "rollout.max_tokens=12",
        "eval.samples=0",
        "train.steps=4",
        "train.save_every=2",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run with a KL term and two updates a batch, in fresh interpreters."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    genuine_torchrun(2, WORKER, "-", *arguments(model, folder, *OPTIONS), compiled=True)
    return folder


OPTIONS = [
    "grpo.beta=0.01",
    "grpo.updates_per_batch=2",
    "optim.schedule=cosine",
    "experts.replay=old_policy",
]


def learning(folder) -> list[dict]:
    """The metrics without times and without the state of the machine."""
    machine = ("seconds", "_per_s", "host/", "device/")
    return [
        {k: v for k, v in record.items() if not any(part in k for part in machine)}
        for record in read_metrics(folder)
    ]


def test_metrics_of_a_run(whole):
    records = [r for r in read_metrics(whole) if "reward" in r]
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    for record in records:
        phases = {k: v for k, v in record.items() if k.startswith("seconds/")}
        total = phases.pop("seconds/step")
        assert sum(phases.values()) == pytest.approx(total, rel=1e-6)
        assert 0 <= phases["seconds/other"] < 0.5 * total
        assert 0 < record["max_mismatch"] < 1e-4
        assert record["kl"] >= 0
        assert 0.5 < record["router_agreement"] <= 1
        assert 0 <= record["pack/padding"] < 0.5
        assert 0 <= record["pack/imbalance"] < 1
        assert record["grad_norm"] > 0
        assert record["sync_bytes"] > 4e5
        assert record["sync_seconds"] > 0
    assert records[-1]["weight_version"] == 8
    assert records[0]["kl"] < records[-1]["kl"]


def test_rollouts_are_records(whole):
    rollouts = read_rollouts(whole / "rollouts" / "step_000003.jsonl")
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert len(rollout.completions) == len(rollout.scores) == 4
        assert rollout.weight_version == 4
        assert len({c.ids for c in rollout.completions}) > 1
        assert all(len(c.ids) == len(c.logps) <= 12 for c in rollout.completions)


def test_transformers_loads_the_result(whole, model):
    trained = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(whole / "model")("12+3")["input_ids"]
    saved = load_file(whole / "model" / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(trained.state_dict()[name], saved[name])
    before = load_file(model / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], saved["lm_head.weight"])


def killed(model, folder, phases: list[str], *more, launcher=torchrun) -> None:
    """A run with one rank SIGKILLed in each of the phases in turn; the launcher starts it again."""
    more = [*OPTIONS, *more]
    launcher(
        2,
        WORKER,
        ",".join(phases),
        *arguments(model, folder, *more),
        restarts=len(phases),
        timeout_s=120 * (1 + len(phases)),
    )
    assert (folder / "kills").read_text().splitlines() == phases


def assert_equal_runs(folder, whole) -> None:
    assert learning(folder) == learning(whole)
    resumed = load_file(folder / "model" / "model.safetensors")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        assert torch.equal(resumed[name], tensor), name


def test_killed_run_resumes_by_itself_bit_equal(whole, model, tmp_path):
    killed(model, tmp_path / "run", ["update", "save"])
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.full
def test_kill_at_every_phase(whole, model, tmp_path):
    """In this order: what follows "gather" takes the rollouts up and does not sample again."""
    phases = ["rollout", "reward", "gather", "pack", "old log-probs", "ref log-probs", "update"]
    phases += ["sync", "save", "save at once", "publish"]
    killed(model, tmp_path / "run", phases, launcher=genuine_torchrun)
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.full
def test_ctrl_c_and_sigterm_leave_a_checkpoint_that_other_layouts_resume(model, tmp_path):
    """Three layouts in turn, each gone on from where a signal stopped the one before.

    The model's folder holds FP8 blocks, as DeepSeek-V3 is published; the generator is sent floats.
    """
    convert(model, tmp_path / "fp8", "fp8")
    model, folder = tmp_path / "fp8", tmp_path / "run"
    more = ["train.steps=500", "train.save_every=0"]
    tensor = ["parallel.tp=2", "parallel.generator_tp=2"]
    first = stopped(model, folder, signal.SIGINT, 2, *more, *tensor)
    second = stopped(model, folder, signal.SIGTERM, first + 1, *more, "parallel.ep=2", "--resume")
    pipeline = ["parallel.pp=2", "grpo.beta=0.01", "--resume"]
    third = stopped(model, folder, signal.SIGTERM, second + 1, *more, *pipeline)
    assert third > second > first >= 2
    records = read_metrics(folder)
    assert [r["step"] for r in records] == list(range(third))
    for record in records:
        assert 0 < record["max_mismatch"] < 1e-4
        assert record["weight_version"] == record["step"] + 1
        assert ("kl" in record) == (record["step"] >= second)


def stopped(model, folder, number: int, steps: int, *more) -> int:
    """Steps in the checkpoint of a run that was sent a signal after `steps` of them."""
    with subprocess.Popen(
        command(2, WORKER, "-", *arguments(model, folder, *more)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        wait_for(folder / "metrics.jsonl", lines=steps)
        run.send_signal(number)
        output, _ = run.communicate(timeout=120)
    assert "continue with --resume" in output
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    return json.loads((checkpoint / "state.json").read_text())["step"]


def wait_for(path, *, lines: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < end, f"{path} did not reach {lines} lines in {seconds} s"
        time.sleep(0.2)
