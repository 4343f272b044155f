"""How reward terms come together: by the prompt's task, in the background, failures apart."""

from __future__ import annotations

import json
import threading

import pytest
from judging import options, serving

from r1kern.config import Grading, Judge, Sandbox
from r1kern.errors import UserError
from r1kern.rewards.model_terms import add_terms
from r1kern.rewards.score import Scorer
from r1kern.types import Completion, Prompt, Rollout

ACCURACY = {"accuracy": 1.0}


def group(prompt: Prompt, *texts: str) -> Rollout:
    return Rollout(prompt, tuple(Completion((1, 2, 3), (), t, "stop") for t in texts), 0)


def prompt(task: str = "math", answer: str = "", **more) -> Prompt:
    return Prompt("p", (1,), answer, "?", question="?", task=task, **more)


def accuracies(scorer: Scorer, rollout: Rollout) -> list[float | None]:
    (scored,) = scorer.score([rollout])
    assert all(score.failure is None for score in scored.scores), scored.scores
    return [score.terms.get("accuracy") for score in scored.scores]


def answer(text: str) -> str:
    return f"<think> so </think> <answer> {text} </answer>"


def test_the_task_says_who_judges():
    scorer = Scorer(ACCURACY)
    assert accuracies(scorer, group(prompt("math", "1/2"), answer("0.5"), answer("2"))) == [1, 0]
    assert accuracies(scorer, group(prompt("choice", "B"), answer("(B)"), answer("A"))) == [1, 0]
    tests = tuple(map(json.dumps, ["assert double(2) == 4", "assert double(-1) == -2"]))
    right, wrong = (answer(f"```python\ndef double(x):\n    return {e}\n```") for e in ("2*x", "4"))
    assert accuracies(scorer, group(prompt("code", tests=tests), right, wrong)) == [1, 0]
    assert accuracies(scorer, group(prompt("general"), "hello")) == [None]


def test_a_judge_is_shown_the_answer_where_no_rule_applies():
    with serving() as server:
        scorer = Scorer(ACCURACY, options=Grading(judge=options(server)))
        told = group(
            prompt("reference", "Paris"), "<think> x </think> Paris", "<think> x </think> Rome"
        )
        assert accuracies(scorer, told) == [1, 0]
        nonsense = Scorer(ACCURACY, options=Grading(judge=options(server, "nonsense")))
        (scored,) = nonsense.score([told])
    assert {s.failure is not None for s in scored.scores} == {True}
    assert all("accuracy" not in s.terms and s.total == 0 for s in scored.scores)


def test_what_the_prompts_need_is_looked_for_before_anything_long():
    with pytest.raises(UserError, match=r"task 'reference', .* set grading\.judge\.url"):
        Scorer(ACCURACY).prepare([prompt("reference", "Paris")])
    nobody = Judge(url="http://127.0.0.1:9/v1", model="m", retries=0, deadline_s=5)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        Scorer(ACCURACY, options=Grading(judge=nobody)).prepare([prompt("reference", "Paris")])
    Scorer({"format": 1.0}).prepare([prompt("reference", "Paris")])  # nothing to judge


def test_a_program_without_a_sandbox_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"bubblewrap.*unsafe_local"):
        Scorer(ACCURACY).prepare([prompt("code", tests=('"assert f() == 1"',))])


def test_a_test_that_cannot_be_read_names_its_prompt():
    with pytest.raises(UserError, match=r"prompt 'p': test 1"):
        Scorer(ACCURACY).prepare([prompt("code", tests=('{"nonsense": 1}',))])


def test_language_length_and_repetition_are_terms():
    weights = {"language": 1.0, "overlong": 1.0, "repetition": 1.0, "format": 0.5}
    scorer = Scorer(weights, options=Grading(overlong_buffer=2, repetition_ngram=2), max_tokens=4)
    english = "<think> we add the numbers </think> <answer> 3 </answer>"
    (scored,) = scorer.score([group(prompt(), english)])
    terms = scored.scores[0].terms
    assert terms["language"] == 1.0 and terms["format"] == 1.0 and terms["overlong"] == -0.5
    assert scored.scores[0].total == pytest.approx(1.0 - 0.5 + terms["repetition"] + 0.5)
    chinese = group(prompt(language="zh"), english)
    assert scorer.score([chinese])[0].scores[0].terms["language"] < 0.1  # the record's language
    forced = Scorer({"language": 1.0}, options=Grading(language="en"))
    assert forced.score([chinese])[0].scores[0].terms["language"] == 1.0


def test_grading_does_not_hold_up_whoever_submits():
    sandbox = Sandbox(timeout_s=30.0)
    scorer = Scorer(ACCURACY, options=Grading(sandbox=sandbox))
    waits = "import time\ntime.sleep(3)\ndef f():\n    return 1\n"
    slow = group(prompt("code", tests=('"assert f() == 1"',)), answer(f"```python\n{waits}```"))
    pending = scorer.submit(slow)
    later = scorer.submit(group(prompt("math", "1"), answer("1")))
    assert not pending.done() and not later.done()  # both calls came back while it slept
    assert pending.result(timeout=60).scores[0].terms == {"accuracy": 1.0}
    assert later.result(timeout=60).scores[0].terms == {"accuracy": 1.0}


def test_ones_own_rewards_are_called_from_one_thread_in_order():
    threads, seen = set(), []

    def mine(completion: Completion, prompt: Prompt) -> float:
        threads.add(threading.get_ident())
        seen.append(completion.text)
        return float(len(completion.text))

    scorer = Scorer({"mine": 2.0}, extra={"mine": mine})
    scored = scorer.score([group(prompt(), str(i), str(i) * 2) for i in range(20)])
    assert len(threads) == 1 and seen == [t for i in range(20) for t in (str(i), str(i) * 2)]
    assert scored[12].scores[1].total == 8.0


def test_reward_models_join_the_total_and_their_silence_is_a_failure():
    scorer = Scorer({"format": 1.0, "helpfulness": 0.5}, later=["helpfulness"])
    (scored,) = scorer.score([group(prompt("general"), "a", "b")])
    assert [s.total for s in scored.scores] == [0.0, 0.0]
    found = [[{"helpfulness": 3.0}, {}]]
    (joined,) = add_terms([scored], found, {"helpfulness": 0.5})
    assert joined.scores[0].terms == {"format": 0.0, "helpfulness": 3.0}
    assert joined.scores[0].total == 1.5
    assert "helpfulness" in joined.scores[1].failure
