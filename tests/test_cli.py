"""Bad input through the command line: one line that names the remedy, exit code 2, nothing lost."""

from __future__ import annotations

import json

import pytest
from launch import ROOT, python
from tiny_model import write_tiny_model

from r1kern import cli, distributed
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.report.metrics import read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_demo_tokenizer()
    write_tiny_model(folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def leave_the_world():
    yield
    distributed.shutdown()


@pytest.fixture
def work(tmp_path, model):
    """Arguments of a short SFT run and a GRPO run in a folder of their own."""
    pairs = [{"problem": f"{i}+1", "completion": f"<answer> {i + 1} </answer>"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    common = [f"model.path={model}", f"run.folder={tmp_path / 'run'}", "model.max_positions=128"]
    return {
        "folder": tmp_path,
        "sft": [
            "sft",
            str(ROOT / "configs" / "demo_sft.yaml"),
            *common,
            f"data.train={tmp_path / 'pairs.jsonl'}",
            "model.init=load",
            "train.steps=4",
            "train.batch_size=4",
            "train.save_every=2",
        ],
        "train": ["train", str(ROOT / "configs" / "demo.yaml"), *common],
    }


def refused(capfd, arguments, *words) -> None:
    """The command fails with exit code 2 and one line on stderr that holds `words`."""
    capfd.readouterr()
    assert cli.run([str(a) for a in arguments]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "r1kern: error" in line]
    assert len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors[0]


def test_config_that_is_not_there(capfd):
    refused(capfd, ["train", ROOT / "configs" / "dmo.yaml"], "no config file", "demo.yaml")


def test_unknown_key(work, capfd):
    refused(capfd, [*work["train"], "grpo.betta=0"], "'grpo.betta'", "did you mean 'beta'?")


def test_missing_data_file(work, capfd):
    refused(capfd, [*work["train"], "data.train=nowhere.jsonl"], "nowhere.jsonl", "give a .jsonl")


def test_malformed_line(work, capfd):
    path = work["folder"] / "bad.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "ans\n')
    refused(capfd, [*work["train"], f"data.train={path}", "data.where={}"], f"{path}:2")


def test_empty_data_set(work, capfd):
    path = work["folder"] / "empty.jsonl"
    path.write_text("\n")
    refused(capfd, [*work["train"], f"data.train={path}"], "empty")


def test_prompt_over_the_budget(work, capfd):
    path = work["folder"] / "long.jsonl"
    path.write_text(json.dumps({"problem": "1+" * 60, "answer": "2"}) + "\n")
    arguments = [*work["train"], f"data.train={path}", "data.where={}"]
    refused(capfd, arguments, f"{path}:1", "122 tokens", "budget", "overlong: drop")


def test_impossible_layout(work, capfd):
    arguments = [*work["train"], "parallel.tp=3", "parallel.ep=5"]
    refused(capfd, arguments, "tp=3 does not divide", "ep=5 does not divide", "world size 1")


def test_another_world_size_than_the_options_say(work, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [*work["train"], "parallel.world_size=4"]
    refused(capfd, arguments, "parallel.world_size=4 but the job has 2 processes", "torchrun")


def test_model_folder_without_config_or_weights(work, capfd, model):
    refused(capfd, [*work["train"], "model.path=nowhere"], "nowhere/config.json", "model.path")
    (work["folder"] / "bare").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (work["folder"] / "bare" / name).write_bytes((model / name).read_bytes())
    arguments = [*work["sft"], f"model.path={work['folder'] / 'bare'}"]
    refused(capfd, arguments, "no *.safetensors", "model.init=random")


def test_unknown_command_and_missing_argument(capfd):
    assert cli.run(["trian"]) == 2
    assert cli.run(["train"]) == 2
    assert "Missing argument" in capfd.readouterr().err


def test_a_run_is_not_overwritten_and_a_broken_checkpoint_is_named(work, capfd):
    assert cli.run(work["sft"]) == 0
    run = work["folder"] / "run"
    assert (run / "model" / "model.safetensors").is_file()
    refused(capfd, work["sft"], "already holds a run (step_000004)", "--resume")
    wrong = run / "checkpoints" / "step_000005"
    wrong.mkdir()
    refused(capfd, [*work["sft"], "--resume"], f"{wrong} is not an r1kern checkpoint")
    wrong.rmdir()
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert cli.run([*work["sft"], "--resume"]) == 0  # nothing left to do
    assert read_metrics(run) == metrics


def test_a_run_folder_that_cannot_be_written(work, capfd):
    """Root passes every permission: a file and /proc refuse it too."""
    (work["folder"] / "file").touch()
    for folder in (work["folder"] / "file", "/proc/self/run"):
        refused(capfd, [*work["sft"], f"run.folder={folder}"], f"run.folder {folder} cannot be")


def test_only_a_restart_of_the_same_job_resumes_by_itself(work, capfd, monkeypatch):
    """The first start of a job, and another job's restart, find a run that is not theirs."""
    claim = work["folder"] / "run" / "job"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert cli.run([*work["sft"], "train.steps=2"]) == 0
    assert claim.read_text() == "one"
    refused(capfd, work["sft"], "already holds a run (step_000002)", "--resume")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for other in ("two", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        refused(capfd, work["sft"], "already holds a run (step_000002)", "--resume")
        assert claim.read_text() == "one"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert cli.run(work["sft"]) == 0
    assert [m["step"] for m in read_metrics(work["folder"] / "run")] == [0, 1, 2, 3]


WITH_LIMIT = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
runpy.run_module("r1kern", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_ends_the_process_with_code_2_and_keeps_the_last_checkpoint(work):
    """Processes of their own: the second save hits a file-size limit set while the first stood."""
    done = python("-m", "r1kern", *work["sft"], "train.steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    full = python("-c", WITH_LIMIT, *work["sft"], "--resume")
    assert full.returncode == 2, full.stderr[-2000:]
    (line,) = [line for line in full.stderr.splitlines() if "r1kern: error" in line]
    assert "free some space" in line
    assert "step_000002" in line
    again = python("-m", "r1kern", *work["sft"], "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert [m["step"] for m in read_metrics(work["folder"] / "run")] == [0, 1, 2, 3]
