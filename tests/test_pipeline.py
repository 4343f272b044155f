"""The pipeline's bookkeeping with real processes and real files: resume, lineage, refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from forked import Forked
from launch import ROOT, environment, python

from r1kern.config import PipelineConfig, load_config
from r1kern.config.pipeline import Readable
from r1kern.data.records import read_records
from r1kern.errors import UserError
from r1kern.rewards.score import score_rollouts
from r1kern.stages import Context, Pipeline, Result, Stage, deepseek_r1, review
from r1kern.stages.choose import choose, in_format
from r1kern.stages.commands import Commands, merged
from r1kern.stages.settings import Settings
from r1kern.types import Completion, Prompt, Rollout

DEMO = ROOT / "configs" / "pipeline_demo.yaml"


def counting(name: str, inputs: dict[str, str], calls: Counter, *, fails: list | None = None):
    """A stage that concatenates its inputs and counts its calls."""

    def run(context: Context) -> Result:
        calls[name] += 1
        if fails:
            raise fails.pop()
        text = "".join(path.read_text() for path in context.inputs.values()) + name
        out = context.folder / "out.txt"
        out.write_text(text)
        dropped = Counter({"nothing": 2})
        return Result({"text": out}, counts={"characters": len(text)}, dropped=dropped)

    return Stage(name, run, inputs)


def chain(calls: Counter, **options) -> list[Stage]:
    return [
        counting("one", {}, calls),
        counting("two", {"before": "one.text"}, calls, **options),
        counting("three", {"a": "one.text", "b": "two.text"}, calls),
    ]


def test_what_is_done_is_not_done_again(tmp_path):
    calls = Counter()
    Pipeline(tmp_path, chain(calls)).run()
    assert (tmp_path / "three" / "out.txt").read_text() == "oneonetwothree"
    records = Pipeline(tmp_path, chain(calls)).run()
    assert calls == {"one": 1, "two": 1, "three": 1}
    assert [r["state"] for r in records] == ["done"] * 3
    assert records[2]["inputs"] == {"a": "one.text", "b": "two.text"}
    assert records[2]["outputs"] == {"text": "three/out.txt"}
    assert records[2]["counts"] == {"characters": 14}
    assert records[2]["dropped"] == {"nothing": 2}


def test_a_failed_stage_is_taken_up_where_it_stands(tmp_path):
    calls = Counter()
    with pytest.raises(OSError, match="no space"):
        Pipeline(tmp_path, chain(calls, fails=[OSError("no space")])).run()
    states = [r["state"] for r in Pipeline(tmp_path, chain(calls)).records()]
    assert states == ["done", "failed", "pending"]
    Pipeline(tmp_path, chain(calls)).run()
    assert calls == {"one": 1, "two": 2, "three": 1}


def test_changed_options_are_refused_and_redone_with_what_follows(tmp_path):
    calls = Counter()
    Pipeline(tmp_path, chain(calls)).run()
    changed = chain(calls)
    changed[1] = Stage("two", changed[1].run, changed[1].inputs, {"lr": 2})
    with pytest.raises(UserError, match=r"'two' .* other options .* --redo two"):
        Pipeline(tmp_path, changed).run()
    Pipeline(tmp_path, changed).run(redo=["two"])
    assert calls == {"one": 1, "two": 2, "three": 2}
    assert len(list(tmp_path.glob("two.old-*"))) == 1  # nothing is deleted
    with pytest.raises(UserError, match="no such stage; there are"):
        Pipeline(tmp_path, changed).run(redo=["four"])


def test_a_changed_input_file_is_noticed(tmp_path):
    calls, given = Counter(), tmp_path / "given.txt"
    given.write_text("x")
    stages = [counting("one", {"file": str(given)}, calls)]
    Pipeline(tmp_path / "p", stages).run()
    given.write_text("y")
    with pytest.raises(UserError, match="other options or inputs"):
        Pipeline(tmp_path / "p", stages).run()


def test_a_stage_cannot_take_what_comes_later(tmp_path):
    stages = chain(Counter())
    with pytest.raises(UserError, match="takes before from 'one', which comes later"):
        Pipeline(tmp_path, [stages[1], stages[0]])
    with pytest.raises(UserError, match="two stages are called 'one'"):
        Pipeline(tmp_path, [stages[0], stages[0]])
    with pytest.raises(UserError, match=r"stage 'one' has no output 'text' yet \(it has \[\]\)"):
        Pipeline(tmp_path, stages).output("one.text")


SLEEPER = """
import sys, time
from pathlib import Path
from r1kern.stages import Pipeline, Result, Stage

def run(context):
    seen = context.folder / "seen.txt"
    seen.write_text((seen.read_text() if seen.exists() else "") + "x")
    if sys.argv[2] == "slow":
        time.sleep(600)
    return Result({"seen": seen})

Pipeline(sys.argv[1], [Stage("only", run)]).run()
"""


def test_a_killed_pipeline_goes_on_and_two_never_share_a_folder(tmp_path):
    script = tmp_path / "pipeline.py"
    script.write_text(SLEEPER)
    folder = tmp_path / "run"
    command = [str(script), str(folder)]
    slow = Forked([*command, "slow"], environment())
    _until((folder / "only" / "seen.txt").exists, slow, "the stage")
    second = python(*command, "fast")
    assert "another pipeline is running" in second.stderr
    slow.kill()
    assert json.loads((folder / "pipeline.json").read_text())["stages"][0]["state"] == "running"
    assert python(*command, "fast").returncode == 0
    assert (folder / "only" / "seen.txt").read_text() == "xx"
    assert json.loads((folder / "pipeline.json").read_text())["stages"][0]["state"] == "done"


def test_a_command_that_fails_names_itself():
    with pytest.raises(UserError, match=r"`r1kern convert nowhere there` ended with code 2"):
        Commands(command=f"{sys.executable}").run("convert", "nowhere", "there")


def test_the_demo_builds_the_papers_stages_in_order():
    config = load_config(PipelineConfig, DEMO)
    stages = {stage.name: stage for stage in deepseek_r1(config)}
    assert list(stages) == [
        *("data", "tiny", "zero", "cold_start"),
        *("reasoning_rl", "rejection", "all_scenarios", "distil"),
    ]
    assert stages["cold_start"].inputs["base"] == stages["rejection"].inputs["base"] == "tiny.model"
    assert stages["reasoning_rl"].inputs["model"] == "cold_start.model"
    assert stages["all_scenarios"].inputs["model"] == "rejection.model"
    settings = Settings(config)
    assert settings.zero["data"]["template"] == "r1-zero"
    assert settings.zero["rewards"] == {"accuracy": 1.0, "format": 0.2}
    assert settings.reasoning_rl["rewards"] == {"accuracy": 1.0, "language": 1.0}


def test_all_mistakes_of_all_stages_are_told_at_once():
    overrides = ["zero.optim.lrr=1", "rejection.sft.train.steps=-1"]
    config = load_config(PipelineConfig, DEMO, overrides)
    with pytest.raises(UserError) as error:
        deepseek_r1(config)
    assert "zero: unknown key 'optim.lrr' (did you mean 'lr'?)" in str(error.value)
    assert "rejection: train.steps" in str(error.value)


def test_a_stage_left_out_is_given_or_missed(tmp_path):
    config = load_config(PipelineConfig, DEMO, ["stages=[distil]"])
    with pytest.raises(UserError, match=r"'distil' needs rejection.data: add 'rejection' to"):
        deepseek_r1(config)
    data = tmp_path / "sft.jsonl"
    given = f"given={{rejection.data: {data}}}"
    config = load_config(PipelineConfig, DEMO, ["stages=[distil]", given])
    with pytest.raises(UserError, match=r"given\.rejection\.data: there is no"):
        deepseek_r1(config)
    data.write_text("{}\n")
    assert deepseek_r1(config)[-1].inputs["data"] == str(data)


def rollout(*texts: str, finish: str = "stop", answer: str = "72") -> Rollout:
    prompt = Prompt("48+24", (1,), answer, "48+24", question="48+24")
    completions = tuple(Completion((1,), (), text, finish) for text in texts)
    return score_rollouts([Rollout(prompt, completions, 0)], {"accuracy": 1.0})[0]


GOOD = "<think> first 8+4=12 then 4+2+1=7 </think> <answer> 72 </answer>"


def test_completions_are_chosen_and_every_drop_has_its_reason():
    texts = (
        *(GOOD, GOOD, GOOD.replace("first", "well first"), GOOD.replace("72", "71")),
        "<think> </think> <answer> 72 </answer>",
        "<think> 先算8+4=12然后再算4+2+1=7 </think> <answer> 72 </answer>",
        "<think> ```python\nprint(48+24)\n``` so it is seventy two </think> <answer> 72 </answer>",
    )
    kept, dropped = choose([rollout(*texts)], Readable(), keep=1)
    assert [completion.text for _, completion in kept] == [GOOD]
    assert dropped == {
        "repeated": 1,
        "more than needed": 1,
        "wrong": 1,
        "no reasoning": 1,
        "mixed languages": 1,
        "code block": 1,
    }
    assert choose([rollout(GOOD, finish="length")], Readable(), keep=1)[1] == {"unfinished": 1}


def test_the_cold_starts_format_can_be_the_papers():
    special = ("|special_token|", "|special_token|")
    assert in_format(GOOD, ("<think>", "</think>")) == GOOD
    written = "|special_token|first 8+4=12 then 4+2+1=7|special_token|72"
    assert in_format(GOOD, special) == written


def test_people_accept_edit_and_reject(tmp_path):
    path = tmp_path / "review.jsonl"
    rows = [{"id": str(i), "problem": f"{i}+1", "completion": f"it is {i + 1}"} for i in range(3)]
    review.export(path, rows)
    with pytest.raises(UserError, match=r"3 records of .* wait for a decision .*review.jsonl:1"):
        review.decided(path)
    records = [record.values for record in read_records(path)]
    for record, decision in zip(records, ("accept", "edit", "reject"), strict=True):
        record["decision"] = decision
    records[1]["edited"] = "It is 2."
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert review.export(path, rows) == path  # decisions are never written over
    kept, counts = review.decided(path)
    assert [row["completion"] for row in kept] == ["it is 1", "It is 2."]
    assert set(kept[0]) == {"id", "problem", "completion"}
    assert counts == {"accept": 1, "edit": 1, "reject": 1}
    path.write_text(json.dumps({**records[0], "decision": "acept"}) + "\n")
    with pytest.raises(UserError, match=r"review.jsonl:1: decision 'acept' is none of accept"):
        review.decided(path)


def test_trees_of_options_lie_over_one_another():
    below = {"train": {"steps": 1, "batch_size": 2}, "rewards": {"a": 1.0}}
    assert merged(below, {"train": {"steps": 3}}) == {
        "train": {"steps": 3, "batch_size": 2},
        "rewards": {"a": 1.0},
    }


def test_the_documented_script_runs(tmp_path):
    """docs/recipe.md: build, insert a stage of one's own, run, resume, inspect."""
    text = (ROOT / "docs" / "recipe.md").read_text()
    script = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((Path(tmp_path) / "runs" / "mine" / "pipeline.json").read_text())
    assert [stage["state"] for stage in record["stages"]] == ["done", "done"]
    assert "is done" in done.stdout  # the second run


ORPHANS = """
import sys
from r1kern.launch import launch
launch(["sft", *sys.argv[1:]], processes=2)
"""


@pytest.mark.full
def test_a_killed_launcher_takes_its_processes_along(tmp_path):
    """They would go on writing into the folder that the next start takes up."""
    from r1kern.data.cold_start import write_cold_start
    from r1kern.data.tiny_model import DEEPSEEK, write_model
    from r1kern.data.tokenizer import build_demo_tokenizer

    write_model(tmp_path / "base", DEEPSEEK, build_demo_tokenizer())
    write_cold_start(["1+2", "3+4", "5+6"], tmp_path / "data.jsonl", visits=20, seed=0)
    run = tmp_path / "run"
    options = [f"model.path={tmp_path}/base", f"data.train={tmp_path}/data.jsonl"]
    options += [f"run.folder={run}", "train.steps=100000"]
    command = [sys.executable, "-c", ORPHANS, str(ROOT / "configs" / "demo_sft.yaml"), *options]
    launcher = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        _until(lambda: (run / "metrics.jsonl").exists(), launcher, "the run's first step")
        ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if _is_rank(p)]
        assert len(ranks) == 2
    finally:
        launcher.kill()  # the launcher alone
        launcher.wait()
    _, left = psutil.wait_procs(ranks, timeout=20)
    assert not left


def _is_rank(process: psutil.Process) -> bool:
    return "r1kern" in process.cmdline() and "sft" in process.cmdline()


def _until(happened, process: subprocess.Popen | Forked, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end and process.poll() is None, f"{what} did not come"
        time.sleep(0.1)


SMALL = [
    *("tiny.steps=250", "tiny.student_steps=20", "tiny.visits=3", "rl.train.steps=2"),
    *("rl.rollout.prompts_per_step=8", "evaluation_samples=1", "data.eval=bundled:gsm8k_arith_val"),
    *("cold_start.collect.prompts=60", "rejection.collect.prompts=60"),
    *("all_scenarios.rl.train.steps=2", "all_scenarios.reward.train.steps=3"),
]
KILLED_AT = [  # files whose appearance is the moment of a kill
    "tiny/model/metrics.jsonl",
    "cold_start/samples_base.jsonl.parts",
    "reasoning_rl/rollouts/step_000001.jsonl",
    "all_scenarios/helpfulness/metrics.jsonl",
    "distil/tiny_qwen2/distilled.jsonl.parts",
]


@pytest.mark.full
def test_all_six_stages_killed_in_five_of_them(tmp_path):
    folder = tmp_path / "run"
    overrides = [f"run.folder={folder}", *SMALL]
    command = [sys.executable, "-m", "r1kern", "pipeline", str(DEMO), *overrides]
    for name in KILLED_AT:
        run = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
        _until((folder / name).exists, run, name, seconds=1800)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=3600)
    stages = json.loads((folder / "pipeline.json").read_text())["stages"]
    assert [stage["state"] for stage in stages] == ["done"] * 8
    measured = {stage["name"]: stage["accuracy"] for stage in stages if stage["accuracy"]}
    assert set(measured) == {
        *("zero", "cold_start", "reasoning_rl", "rejection", "all_scenarios", "distil")
    }
    assert (folder / "report.html").stat().st_size > 100_000
