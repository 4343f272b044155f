"""Win rates by a judge: statistics against independent truth, runs against a real server."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from judging import log, options, serving
from launch import environment

from r1kern import cli
from r1kern.config import JudgeConfig
from r1kern.errors import UserError
from r1kern.eval.judged import judge_answers, read_answers
from r1kern.eval.win_rate import agreement, arena_hard, interval, length_controlled


def test_arena_hard_counts_strong_verdicts_three_times():
    # Worked by hand from the published table: A>>B is three wins of A, A=B half a win.
    labels = [("A>>B", "B>>A"), ("A>B", "A>B"), ("A=B", "B>A"), ("B>>A", "A=B")]
    points, weights = arena_hard(labels)
    assert points.tolist() == [6.0, 1.0, 1.5, 0.5]
    assert weights.tolist() == [6.0, 2.0, 2.0, 4.0]
    assert agreement(labels) == 0.25
    assert agreement([*labels, ("A>B", "B>>A"), ("A=B", "A=B")]) == 0.5


def test_the_arena_score_is_what_bradley_terry_predicts():
    points, weights = arena_hard([("A>>B", "B>A"), ("B>A", "A=B"), ("A>B", "A>>B"), ("A=B", "B>A")])
    won, battles = points.sum(), weights.sum()
    low, high = -20.0, 20.0  # bisection on the slope of the log-likelihood
    for _ in range(100):
        advantage = (low + high) / 2
        slope = won / (1 + math.exp(advantage)) - (battles - won) / (1 + math.exp(-advantage))
        low, high = (advantage, high) if slope > 0 else (low, advantage)
    assert 1 / (1 + math.exp(-advantage)) == pytest.approx(won / battles, abs=1e-12)


def drawn(questions: int, theta: float, phi: float):
    """Outcomes of a judge that likes length."""
    draws = np.random.default_rng(0)
    ours, theirs = draws.integers(200, 3000, questions), draws.integers(100, 2000, questions)
    difference = ours - theirs
    x = np.tanh(difference / difference.std())
    chance = 1 / (1 + np.exp(-(theta + phi * x)))
    return (draws.random(questions) < chance).astype(float), ours, theirs


def test_length_is_controlled():
    outcomes, ours, theirs = drawn(20_000, theta=-0.4, phi=1.5)
    rate = length_controlled(outcomes, ours, theirs)
    assert rate == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.02)
    assert outcomes.mean() > rate + 0.05  # the longer answers had won more
    assert length_controlled(1 - outcomes, theirs, ours) == pytest.approx(1 - rate, abs=1e-9)
    # Equal lengths, ties: nothing to control.
    same = np.array([1.0, 0.5, 0.5, 0.0, 1.0])
    assert length_controlled(same, np.ones(5), np.ones(5)) == pytest.approx(0.6, abs=0.01)
    # Separated by length alone, or all won: finite, and on the right side.
    assert 0.4 < length_controlled(np.array([1.0, 0.0] * 9), [9, 1] * 9, [1, 9] * 9) < 0.6
    assert 0.99 < length_controlled(np.ones(50), np.arange(50), np.ones(50)) < 1


def test_the_length_fit_is_the_maximum():
    outcomes, ours, theirs = drawn(60, theta=0.3, phi=-1.0)
    outcomes[:9] = 0.5
    difference = ours - theirs
    x = np.tanh(difference / difference.std())
    theta = phi = 0.0
    for _ in range(20_000):  # plain gradient descent
        error = 1 / (1 + np.exp(-theta - phi * x)) - outcomes
        theta -= 0.02 * (error.sum() + 0.01 * theta)
        phi -= 0.02 * ((error * x).sum() + 0.01 * phi)
    truth = 1 / (1 + math.exp(-theta))
    assert length_controlled(outcomes, ours, theirs) == pytest.approx(truth, abs=1e-9)


def test_intervals_are_those_of_the_mean():
    values = np.random.default_rng(1).random(400)
    low, high = interval(400, lambda i: values[i].mean(), rounds=2000, seed=0)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


@pytest.fixture(scope="module")
def server():
    with serving() as address:
        yield address


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def answer(i: int, completion: str) -> dict:
    return {"id": str(i), "question": f"question {i}?", "completion": completion}


@pytest.fixture
def files(tmp_path):
    """24 questions: the model wins 0-11, loses 12-17, ties 18-21, has no summary in 22 and 23."""
    ours = ["good good"] * 6 + ["good"] * 6 + ["bad"] * 6 + ["fair"] * 4 + ["<think> good good"] * 2
    ours = [f"<think> good good good {i} </think> {text}" for i, text in enumerate(ours[:22])]
    ours += ["<think> good good"] * 2
    theirs = ["bad"] * 12 + ["good"] * 6 + ["fair"] * 4 + ["bad"] * 2
    return (
        write(tmp_path / "ours.jsonl", [answer(i, text) for i, text in enumerate(ours)]),
        write(tmp_path / "theirs.jsonl", [answer(i, text) for i, text in enumerate(theirs)]),
    )


def config_file(tmp_path, judge) -> str:
    return write(tmp_path / "judge.yaml", [{"judge": judge.model_dump(), "bootstrap_rounds": 100}])


def test_the_command_counts_resumes_and_shows_the_summary_only(server, files, tmp_path, capsys):
    judge = options(server)
    out, figures = tmp_path / "out" / "judgements.jsonl", tmp_path / "figures.json"
    command = ["judge", *files, "--config", config_file(tmp_path, judge), "--out", str(out)]
    assert cli.run([*command, "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    assert "win rate            58.3 %" in shown and "24 questions" in shown
    result = json.loads(figures.read_text())
    # 12 wins, 8 losses, 4 ties. Battles: 6 x 6 + 6 x 2 won, 6 x 2 lost, 4 x 2 halved, 2 x 6 lost.
    assert result["win_rate"] == pytest.approx(14 / 24)
    assert result["arena_hard"] == pytest.approx((48 + 4) / (48 + 12 + 8 + 12))
    assert (result["agreement"], result["unfinished"], result["failures"]) == (1.0, 2, 0)
    low, high = result["win_rate_interval"]
    assert 0.3 < low < 14 / 24 < high < 0.8
    sent = log(judge)["requests"]
    asked = [r for r in sent if "<<ANSWER A" in str(r)]
    assert len(asked) == 2 * 22 and "good good good" not in json.dumps(sent)

    # A rerun asks nothing; a torn last line, a lost one and a changed answer are asked again.
    again = tmp_path / "again.json"
    assert cli.run([*command, "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == result and len(log(judge)["requests"]) == len(sent)
    lines = out.read_bytes().splitlines(keepends=True)
    asked_lines = [line for line in lines if json.loads(line)["explanations"]]
    rest = [line for line in lines if line not in asked_lines[:2]]
    out.write_bytes(b"".join(rest) + asked_lines[0][:50])
    changed = [
        answer(i, "better good") if i == 0 else json.loads(line)
        for i, line in enumerate(Path(files[1]).read_text().splitlines())
    ]
    write(tmp_path / "theirs.jsonl", changed)
    assert cli.run([*command, "--json", str(again)]) == 0
    asked_again = len([r for r in log(judge)["requests"] if "<<ANSWER A" in str(r)]) - 44
    first_was_lost = any(json.loads(line)["id"] == "0" for line in asked_lines[:2])
    assert asked_again == 2 * (2 + (not first_was_lost))
    assert all(json.loads(line) for line in out.read_bytes().splitlines())


def test_a_killed_run_goes_on_where_it_was(server, files, tmp_path):
    judge = options(server, "slow", concurrency=2)
    out = tmp_path / "judgements.jsonl"
    command = [sys.executable, "-m", "r1kern", "judge", *files, "--out", str(out)]
    command += ["--config", config_file(tmp_path, judge)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < 6:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match="is being written by another r1kern judge"):
        judge_answers(JudgeConfig(judge=judge, bootstrap_rounds=100), *files, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = out.read_bytes().count(b"\n")
    asked = len([r for r in log(judge)["requests"] if "<<ANSWER A" in str(r)])
    time.sleep(0.3)
    result = judge_answers(JudgeConfig(judge=judge, bootstrap_rounds=100), *files, out)
    assert result.questions == 24 and kept < 24
    more = len([r for r in log(judge)["requests"] if "<<ANSWER A" in str(r)]) - asked
    assert 2 * (24 - kept) <= more <= 2 * (24 - kept) + 2


def test_failed_judgements_are_kept_shown_and_asked_again(server, files, tmp_path):
    out = tmp_path / "judgements.jsonl"
    judge = options(server, "ok," + ",".join(["ok", "ok", "422", "422"] * 3 + ["ok"]))
    judge = judge.model_copy(update={"concurrency": 1})
    config = JudgeConfig(judge=judge, bootstrap_rounds=100)
    first = judge_answers(config, *files, out)
    assert first.failures > 0 and first.questions + first.failures == 24
    assert f"{first.failures} not judged: run the command again" in first.lines()
    assert out.read_text().count("HTTP 422") == first.failures
    second = judge_answers(config, *files, out)
    assert (second.failures, second.win_rate) == (0, pytest.approx(14 / 24))
    bad = options(server, "ok,nonsense")
    none = [write(tmp_path / f"{name}.jsonl", [answer(1, name)]) for name in ("x", "y")]
    with pytest.raises(UserError, match=r"none of 1 questions was judged .*no verdict, twice"):
        judge_answers(JudgeConfig(judge=bad), *none, tmp_path / "none.jsonl")


def test_other_benchmarks_files_are_read(tmp_path):
    alpaca = write(
        tmp_path / "a.jsonl", [{"instruction": "Who?", "output": "I.", "generator": "m"}]
    )
    turns = [{"content": "<think> x </think> Me."}]
    arena = write(tmp_path / "b.jsonl", [{"question_id": "q7", "choices": [{"turns": turns}]}])
    assert read_answers(alpaca)[0].question == "Who?"
    assert (read_answers(arena)[0].id, read_answers(arena)[0].summary) == ("q7", "Me.")


def test_bad_files_are_refused_before_anyone_is_asked(server, files, tmp_path):
    judge = options(server)
    config = JudgeConfig(judge=judge, bootstrap_rounds=100)

    def refused(ours, theirs=files[1], out=tmp_path / "o.jsonl") -> str:
        with pytest.raises(UserError) as error:
            judge_answers(config, ours, theirs, out)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such data file" in refused(tmp_path / "nothing.jsonl")
    wrong = write(tmp_path / "w.jsonl", [{"id": "1", "completion": "x"}])
    assert "w.jsonl:1: no field 'question'" in refused(wrong)
    wrong = write(tmp_path / "w.jsonl", [{"id": "1", "question": "x"}])
    assert "w.jsonl:1: no field 'choices'" in refused(wrong)
    wrong = write(tmp_path / "w.jsonl", [answer(1, None)])
    assert "w.jsonl:1: the answer must be text" in refused(wrong)
    wrong = write(tmp_path / "w.jsonl", [answer(1, "x")] * 2)
    assert "question '1' is answered twice" in refused(wrong)
    wrong = write(tmp_path / "w.jsonl", [answer(1, "x"), answer(99, "x")])
    assert "does not answer 1 of the 2 questions of" in refused(wrong)
    (tmp_path / "notes.jsonl").write_text("my notes\n")
    assert "notes.jsonl:1 is no judgement" in refused(files[0], out=tmp_path / "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == "my notes\n"
    assert log(judge)["requests"] == []
    gone = config.model_copy(update={"judge": judge.model_copy(update={"model": "gone"})})
    with pytest.raises(UserError, match="does not serve 'gone'"):
        judge_answers(gone, *files, tmp_path / "o.jsonl")
