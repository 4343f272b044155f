"""What the documents name exists: commands, options, configuration keys, files; Slurm's script."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
import typer
from launch import ROOT
from torch.distributed.run import get_args_parser

from r1kern.cli import app
from r1kern.config import SFTConfig, TrainConfig, load_config

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "docs").glob("slurm/*.sbatch"))
COMMANDS = typer.main.get_command(app).commands
SECTIONS = {
    name: field.annotation
    for kind in (TrainConfig, SFTConfig)
    for name, field in kind.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
scripts = pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)


def code_lines(text: str) -> list[str]:
    """Lines of fenced blocks (not Python's) and inline code."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(r"`([^`]+)`", prose)
    return lines + [" ".join(span.split()) for span in spans]


def calls(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(command, words behind it) of every call of r1kern."""
    found = []
    for line in lines:
        words = shlex.split(line.partition(" #")[0].replace("'", ""), posix=False)
        for i, word in enumerate(words[:-1]):
            if re.search(r"(^|/)r1kern$", word) and re.fullmatch("[a-z]+", words[i + 1]):
                found.append((words[i + 1], words[i + 2 :]))
    return found


def wrong_keys(text: str) -> list[str]:
    keys = re.findall(r"(?<![\w./])([a-z]+)\.([a-z_0-9]+)(?![\w./(]*[/(])", text)
    return [
        f"{section}.{key}"
        for section, key in keys
        if section in SECTIONS and key not in SECTIONS[section].model_fields and key != "py"
    ]


@documents
def test_the_commands_and_their_options_exist(path):
    found = calls(code_lines(path.read_text()))
    assert found
    for command, words in found:
        assert command in COMMANDS, f"r1kern {command}"
        known = {o for p in COMMANDS[command].params for o in p.opts}
        flags = {w.partition("=")[0] for w in words if w.startswith("--")}
        assert flags <= known, f"r1kern {command} {flags - known}"


@documents
def test_the_configuration_keys_exist(path):
    text = re.sub(r"```python\n.*?```", "", path.read_text(), flags=re.DOTALL)
    assert wrong_keys(text) == []


def test_a_key_that_does_not_exist_is_seen():
    assert wrong_keys("set `optim.lr=1` and `optim.learning_rate`") == ["optim.learning_rate"]
    assert wrong_keys("see train/grpo.py, rewards.math.verify, a/train.pt") == []


@documents
def test_the_files_exist(path):
    named = set(re.findall(r"(?:configs|docs|benchmarks|tests)/[\w./-]+\.\w+", path.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@scripts
def test_the_script_is_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


STAND_INS = {
    # Runs on this machine what Slurm would run on every node; the doctor's findings are not ours.
    "srun": 'while [[ $1 == --* ]]; do shift; done; [[ $2 == doctor ]] || exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >>"$LOG/scontrol"; fi',
    "torchrun": 'trap "echo ended >$LOG/term; exit 143" TERM\n'
    'printf "%s\\n" "$@" >"$LOG/torchrun"\n'
    'for _ in $(seq "${RUNS:-0}"); do sleep 0.1; done; exit "${CODE:-0}"',
}


@pytest.fixture
def slurm(tmp_path):
    """Starts a script with stand-ins for Slurm's commands and torchrun; they write into `log`."""
    binaries, venv, log = tmp_path / "bin", tmp_path / "venv" / "bin", tmp_path / "log"
    for folder in (binaries, venv, log):
        folder.mkdir(parents=True)
    for name, text in STAND_INS.items():
        program = (venv if name == "torchrun" else binaries) / name
        program.write_text(f"#!/usr/bin/env bash\n{text}\n")
        program.chmod(0o755)

    def start(path, *arguments, **variables):
        environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "LOG": str(log),
            "VENV": str(venv.parent),
            "USER": "somebody",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-32]",
            "SLURM_JOB_NUM_NODES": "32",
        }
        return subprocess.Popen(
            ["bash", ROOT / path, *arguments], cwd=tmp_path, env=environment | variables
        )

    start.log = log
    return start


@scripts
def test_the_script_starts_a_real_command(slurm, path):
    assert slurm(path, "optim.lr=1e-6").wait(timeout=20) == 0
    words = (slurm.log / "torchrun").read_text().splitlines()
    options = get_args_parser().parse_args(words)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("32", "8", "c10d")
    assert options.rdzv_endpoint == "localhost:29500"
    assert options.module and options.training_script == "r1kern"
    command, config, *rest = options.training_script_args
    assert command in COMMANDS
    assert rest == ["--resume", "optim.lr=1e-6"]
    assert load_config(TrainConfig, ROOT / config, rest[1:]).parallel.world_size == 32 * 8
    assert not (slurm.log / "scontrol").exists(), "a run that is done is not queued again"


@scripts
def test_the_script_passes_the_signal_on_and_is_queued_again(slurm, path):
    process = slurm(path, RUNS="100")
    while not (slurm.log / "torchrun").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert (slurm.log / "term").read_text() == "ended\n"
    assert (slurm.log / "scontrol").read_text() == "requeue 7\n"


@scripts
def test_a_failing_run_is_not_queued_for_ever(slurm, path):
    assert slurm(path, CODE="1", SLURM_RESTART_COUNT="2").wait(timeout=20) == 1
    assert (slurm.log / "scontrol").read_text() == "requeue 7\n"
    assert slurm(path, CODE="1", SLURM_RESTART_COUNT="20").wait(timeout=20) == 1
    assert (slurm.log / "scontrol").read_text() == "requeue 7\n"
