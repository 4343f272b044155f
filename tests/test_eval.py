"""`r1kern eval` on the tiny model: killed, resumed, one result; sampling that loses nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
from forked import Forked
from launch import TESTS, environment
from tiny_model import write_tiny_model

from r1kern import cli, distributed
from r1kern.config import EvalConfig, load_config
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.eval.metrics import pass_at_1
from r1kern.eval.run import evaluate
from r1kern.report.rollouts import read_rollouts, write_rollouts
from r1kern.rewards.format import format_reward
from r1kern.types import Score


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model and a configuration of three benchmarks, small enough for seconds."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = build_demo_tokenizer()
    write_tiny_model(
        folder / "model",
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=4096,
    )
    tokenizer.save_pretrained(folder / "model")
    sums = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sums))
    config = {
        "run": {"folder": str(folder / "run"), "deadline_s": 300},
        "model": {"path": str(folder / "model")},
        "protocol": {"samples": 4, "max_tokens": 24, "template": "none", "chunk": 2},
        "benchmarks": {
            "sums": {"kind": "math", "path": str(folder / "sums.jsonl"), "template": "r1-zero"},
            "gsm8k": {"kind": "gsm8k", "path": str(TESTS / "data" / "gsm8k.jsonl"), "samples": 2},
            "mmlu": {"kind": "mmlu", "path": str(TESTS / "data" / "mmlu.jsonl"), "limit": 3},
        },
    }
    (folder / "eval.yaml").write_text(json.dumps(config))
    yield folder
    distributed.shutdown()


def chunks(folder, benchmark="*") -> dict:
    """Stored files and what tells that they were not written again."""
    paths = folder.glob(f"{benchmark}/samples/*/*.jsonl")
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(paths)}


def run_eval(work, *overrides, folder="run") -> dict:
    """As the command does, but the process groups stay, which the next engine needs."""
    place = f"run.folder={work / folder}"
    results = evaluate(load_config(EvalConfig, work / "eval.yaml", [place, *overrides]))
    assert results == json.loads((work / folder / "results.json").read_text())
    return results


def refused(capfd, work, *arguments) -> str:
    capfd.readouterr()
    assert cli.run(["eval", str(work / "eval.yaml"), *arguments]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "r1kern: error" in x]
    return line


def test_bad_input_is_one_line(work, capfd):
    line = refused(capfd, work, "benchmarks.gsm8k.path=none.jsonl")
    assert "'gsm8k'" in line and "none.jsonl" in line and "grade-school-math" in line
    line = refused(capfd, work, "protocol.temperature=0")
    assert "same completion 4 times for 'sums'" in line and "set samples to 1" in line
    assert "gsm8k.kind' is required" in refused(capfd, work, "benchmarks.gsm8k={path: x}")
    line = refused(capfd, work, "benchmarks.gsm8k.sample=3", "grading.judge={ur: x}")
    assert "'benchmarks.gsm8k.sample' (did you mean 'samples'?)" in line
    assert "'grading.judge.ur' (did you mean 'url'?)" in line
    line = refused(capfd, work, "protocol.max_tokens=4090")
    assert "positions of the model" in line and "benchmarks.gsm8k.max_tokens=" in line
    line = refused(capfd, work, "parallel.generator_tp=3")
    assert "generator_tp" in line
    assert not (work / "run").exists()


def test_killed_and_resumed_it_is_the_run_that_was_not(work, caplog):
    """SIGKILL in the middle; this process samples the rest, and nothing whole a second time."""
    process = Forked(["-m", "r1kern", "eval", str(work / "eval.yaml")], environment())
    end = time.monotonic() + 240
    while len(chunks(work / "run")) < 2 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    kept = chunks(work / "run")
    assert 2 <= len(kept) < 6 + 3 + 2

    caplog.set_level("INFO", "r1kern")
    results = run_eval(work)
    after = chunks(work / "run")
    assert len(after) == 6 + 3 + 2
    assert {path: after[path] for path in kept} == kept
    check(work, results)
    assert re.search(r"graded: \d+ of \d+ chunks in [\d.]+ s, \d+:\d\d:\d\d to go", caplog.text)
    assert "benchmark mmlu: 3 problems" in caplog.text

    whole = run_eval(work, folder="whole")
    assert whole["benchmarks"] == results["benchmarks"]
    fresh = [path.read_bytes() for path in chunks(work / "whole")]
    assert [path.read_bytes() for path in after] == fresh


def check(work, results) -> None:
    """The metrics once more, from the stored samples."""
    assert results["model"] == str(work / "model")
    assert results["versions"]["torch"] and results["seed"] == 0
    assert results["benchmarks"]["gsm8k"]["protocol"]["samples"] == 2
    for name, problems in {"sums": 12, "gsm8k": 5, "mmlu": 3}.items():
        rollouts = [r for p in chunks(work / "run", name) for r in read_rollouts(p)]
        metrics = results["benchmarks"][name]["metrics"]
        assert metrics["problems"] == len(rollouts) == len({r.prompt.id for r in rollouts})
        assert len(rollouts) == problems
        correct = [[s.terms["accuracy"] == 1 for s in r.scores] for r in rollouts]
        assert metrics["pass@1"] == pytest.approx(pass_at_1(correct))
        completions = [c for r in rollouts for c in r.completions]
        assert metrics["tokens"] == pytest.approx(
            sum(len(c.ids) for c in completions) / len(completions)
        )
        cut = [c.finish == "length" for c in completions]
        assert metrics["truncated"] == pytest.approx(sum(cut) / len(cut))
        assert metrics["truncated"] > 0
        formatted = [format_reward(c.text) for c in completions]
        assert metrics["format"] == pytest.approx(sum(formatted) / len(formatted))
        assert name in (work / "run" / "results.md").read_text()


def test_what_is_stored_is_only_computed_again(work, caplog):
    """No engine is built, and answers that changed are judged anew."""
    before = chunks(work / "run")
    (work / "run" / "results.json").unlink()
    caplog.set_level("INFO", "r1kern")
    earlier = run_eval(work)["benchmarks"]["sums"]["metrics"]["pass@1"]
    assert "benchmark mmlu" in caplog.text and "sampling" not in caplog.text
    assert chunks(work / "run") == before

    # the gold answers become what the first samples say
    rollouts = {r.prompt.id: r for p in chunks(work / "run", "sums") for r in read_rollouts(p)}
    said = {name: r.completions[0].text for name, r in rollouts.items()}
    assert all(text.strip() for text in said.values())
    sums = [
        {"id": f"math-{i}", "problem": f"{i}+1", "answer": said[f"math-{i}"]} for i in range(12)
    ]
    (work / "said.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sums))
    results = run_eval(work, f"benchmarks.sums.path={work / 'said.jsonl'}")
    assert results["benchmarks"]["sums"]["metrics"]["pass@1"] > earlier
    assert chunks(work / "run") == before


def test_other_options_do_not_mix(work, caplog):
    """Another budget: other samples. More problems, other chunks: what is there is used."""
    before, mmlu = chunks(work / "run", "gsm8k"), chunks(work / "run", "mmlu")
    caplog.set_level("INFO", "r1kern")
    more = ["benchmarks.gsm8k.max_tokens=8", "benchmarks.mmlu.limit=5", "protocol.chunk=5"]
    results = run_eval(work, *more)
    (path,) = chunks(work / "run", "gsm8k").keys() - before.keys()
    assert path.parent not in {p.parent for p in before}
    assert json.loads((path.parent / "options.json").read_text())["sampling"]["max_tokens"] == 8
    assert results["benchmarks"]["gsm8k"]["metrics"]["tokens"] <= 8
    assert "sampling 10 completions in 1 chunks" in caplog.text
    (new,) = chunks(work / "run", "mmlu").keys() - mmlu.keys()
    assert new.parent in {p.parent for p in mmlu} and len(read_rollouts(new)) == 2
    assert "sampling 8 completions in 1 chunks" in caplog.text
    assert results["benchmarks"]["mmlu"]["metrics"]["problems"] == 5


def test_a_damaged_file_is_named(work, capfd):
    path = next(iter(chunks(work / "run", "sums")))
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    line = refused(capfd, work)
    assert str(path) in line and "remove it" in line
    path.write_text(whole)


def test_samples_are_judged_again_when_asked(work):
    path = next(iter(chunks(work / "run", "sums")))
    rollouts = read_rollouts(path)
    right_all = tuple([Score({"accuracy": 1.0, "format": 0.0}, 1.0)] * 4)
    forged = [dataclasses.replace(rollout, scores=right_all) for rollout in rollouts]
    write_rollouts(path, forged)
    wrong = run_eval(work)["benchmarks"]["sums"]["metrics"]["pass@1"]
    right = run_eval(work, "regrade=true")["benchmarks"]["sums"]["metrics"]["pass@1"]
    assert right < wrong
    assert read_rollouts(path) == rollouts


def test_the_command_prints_the_table(work, capfd):
    """Everything is stored: it computes, prints and leaves the process groups."""
    before = chunks(work / "run")
    (work / "run" / "results.json").unlink()
    assert cli.run(["eval", str(work / "eval.yaml")]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"benchmark +problems x k +pass@1 %", printed)
    assert re.search(r"gsm8k +5 x 2 +\d", printed) and "results.md" in printed
    assert (work / "run" / "results.json").is_file() and chunks(work / "run") == before
