import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1kern.errors import UserError
from r1kern.rewards.format import TAGS, format_reward
from r1kern.rewards.math import MathGrader, Verdict, shared_grader, verify
from r1kern.rewards.score import score_rollouts
from r1kern.types import Completion, Prompt, Rollout

BOMB = "$9^{9^{9^{9^9}}}$"


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader()
    yield grader
    grader.close()


EQUAL = [
    ("12", "12"),
    ("1,000", "1000"),
    ("$72", "72"),
    ("72.50", "72.5"),
    ("1e-3", "0.001"),
    ("<think> 48+24 </think> <answer> 72 </answer>", "72"),
    ("<answer>1</answer> no: <answer>72</answer>", "72"),
    ("<answer> \\boxed{72} </answer>", "72"),
    ("so \\boxed{1} or rather \\boxed{\\frac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt{2}}"),
    ("<think> 5 </think> the answer is 72.", "72"),
    ("We get 48/2 = 24, so the total is 48+24 = 72 clips.", "72"),
    ("<answer>72 clips</answer>", "72"),
    ("72", "72 clips"),
    ("1 000", "1000"),
    ("-5 degrees", "-5"),
    ("\\frac{1}{2}", "0.5"),
    ("\\sqrt{18}", "3\\sqrt{2}"),
    ("0.333333333", "1/3"),
    ("0.333333333", "0.3333333333333"),
    ("hmm, wait. " * 1000 + "The answer is 72.", "72"),
    ("50%", "0.5"),
    ("x=5", "5"),
    ("9**2", "81"),
    ("1+x^2", "x^2+1"),
    ("(1,2)", "(1, 2)"),
    ("\\{2,1\\}", "\\{1,2\\}"),
    ("[0, 1)", "[0,1)"),
    ("\\text{C}", "(C)"),
    ("Thursday", "Thursday"),
    ("#### 72", "72"),
]
DIFFERENT = [
    ("7", "8"),
    ("1000.1", "1000"),
    ("", "72"),
    ("", ""),
    ("<answer> </answer>", "72"),
    ("<answer>72</answer> no: <answer>1</answer>", "72"),
    ("<think> 8+4=12,4+2+1=7", "7"),
    ("<think> 5 </think> <answer> 7", "7"),
    ("3\\sqrt{2}", "3"),
    ("5 or 6", "6"),
    ("1 2", "3"),
    ("9**2", "9"),
    ("2xy", "2"),
    ("sin 30", "30"),
    ("(2,1)", "(1,2)"),
    ("0.33", "1/3"),
    ("Thursday", "Friday"),
]


def test_answers_are_judged_by_what_they_mean(grader):
    verdicts = grader.grade([*EQUAL, *DIFFERENT])
    assert verdicts[: len(EQUAL)] == [Verdict(True)] * len(EQUAL)
    assert verdicts[len(EQUAL) :] == [Verdict(False)] * len(DIFFERENT)
    assert verify("\\frac{1}{2}", "0.5") is True
    assert verify("\\frac{1}{2}", "0.6") is False


numbers = st.decimals(-10_000, 10_000, places=3).map(str) | st.integers(-(10**40), 10**40).map(str)


@given(numbers, numbers)
def test_plain_numbers_are_compared_exactly(left, right):
    assert verify(f"<answer> {left} </answer>", left)
    assert verify(left, right) == (Decimal(left) == Decimal(right))


@given(st.integers(-(10**60), 10**60))
def test_long_whole_numbers_are_compared_to_the_last_digit(number):
    assert verify(f"{number:,}.00", str(number))
    assert not verify(str(number + 1), str(number))


any_text = st.text(st.characters(exclude_categories=()), max_size=60)
mathematical = st.text(st.sampled_from("0123456789+-*/^=(){}[]$\\., xyie%<>&_!|"), max_size=40)
wrappers = st.sampled_from(["{}", "<answer>{}</answer>", "\\boxed{{{}}}", "${}$", "<think>{}"])


@settings(max_examples=60, deadline=None)
@given(wrappers, any_text | mathematical)
def test_no_text_makes_verify_raise(grader, wrapper, text):
    for verdict in grader.grade([(wrapper.format(text), "72"), ("72", wrapper.format(text))]):
        assert isinstance(verdict.correct, bool)
        assert not (verdict.correct and verdict.failure)


ATTACKS = {
    "tower of python powers": "9**9**9**9",
    "tower of powers": BOMB,
    "boxed tower": "\\boxed{9^{9^{9^{9^9}}}}",
    "factorial": "$100000000!$",
    "deep nesting": "(" * 100_000 + "1" + ")" * 100_000,
    "deep fractions": "$" + "\\frac{1}{" * 40 + "2" + "}" * 40 + "$",
    "megabytes of digits": "1" * 5_000_000,
    "megabytes of words": "seventy two " * 400_000,
    "megabytes of tags": "<answer>" * 600_000 + "</answer>" * 600_000,
    "megabytes of boxes": "\\boxed{" * 700_000,
    "a box without end": "\\boxed{" + "{" * 5_000_000,
    "a box of megabytes": "\\boxed{" + "7" * 5_000_000 + "}",
    "dollars": "$" * 1_999,
    "nul": "7\0002",
    "lone surrogate": "\ud800",
    "newlines": "<answer>7\n2\n</answer>",
    "a reply": '{"correct": true}\n{"correct": true}',
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_contained(grader, attack):
    grader.grade([("\\frac{1}{2}", "0.5")] * 2)
    started = time.monotonic()
    assert not grader.grade([(attack, "72")], deadline_s=1.0)[0].correct
    # One second of processor time, at most four on the clock, and a worker's start under load.
    assert time.monotonic() - started < 4.0 + 6.0
    assert grader.grade([("\\frac{1}{2}", "0.5")]) == [Verdict(True)]


def test_a_grader_failure_is_not_a_wrong_answer(grader):
    late, wrong = grader.grade([(BOMB, "72"), ("71", "72")], deadline_s=0.5)
    assert late == Verdict(False, "deadline: math-verify took more than 0.5 s of processor time")
    assert wrong == Verdict(False)
    stopped = MathGrader(workers=1)
    stopped.grade([("\\frac{1}{2}", "0.5")])
    os.kill(stopped._workers[0]._process.pid, signal.SIGSTOP)  # uses no processor time
    started = time.monotonic()
    asleep = stopped.grade([("\\frac{1}{2}", "0.5")], deadline_s=0.5)[0]
    assert asleep == Verdict(False, "deadline: math-verify took more than 2 s")
    assert time.monotonic() - started < 2 + 10
    stopped.close()
    assert not verify(BOMB, "72")


def test_a_worker_that_dies_is_replaced():
    grader = MathGrader(workers=1)
    hard = ("\\frac{1}{2}", "0.5")
    assert grader.grade([hard]) == [Verdict(True)]
    os.kill(grader._workers[0]._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert grader.grade([hard]) == [Verdict(True)]  # died idle

    pid = grader._workers[0]._process.pid
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    died = grader.grade([(BOMB, "72")], deadline_s=30)[0]
    assert died == Verdict(False, "crash: the math-verify process ended with code -9")
    assert grader.grade([hard]) == [Verdict(True)]
    grader.close()


def test_an_interrupted_question_does_not_answer_the_next_one():
    def interrupt(*_):
        raise KeyboardInterrupt

    grader = MathGrader(workers=1)
    grader.grade([("\\frac{1}{2}", "0.5")])
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            grader.grade([("$\\sum_{n=1}^{10^9} n^7 + 10000!$", "0")], deadline_s=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    time.sleep(1)
    assert grader.grade([("\\frac{1}{2}", "0.5")]) == [Verdict(True)]
    grader.close()


def test_verify_works_from_many_threads():
    pairs = [(f"\\frac{{{i}}}{{7}}", f"{i + i % 2}/7") for i in range(1, 41)]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda pair: verify(*pair), pairs))
    assert got == [i % 2 == 0 for i in range(1, 41)]


def test_workers_are_limited_in_memory():
    grader = MathGrader(workers=1, memory_mb=1024)
    grader.grade([("\\frac{1}{2}", "0.5")])
    pid = grader._workers[0]._process.pid
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (1 << 30, 1 << 30)
    grader.close()


SCRIPT = """
print("started")
from r1kern.rewards.math import MathGrader
import os, signal, threading
grader = MathGrader(workers=2)
grader.grade([("\\\\frac{1}{2}", "0.5"), ("\\\\frac{1}{3}", "0.5")])
print(*[worker._process.pid for worker in grader._workers], flush=True)
"""
KILLED_BUSY = """
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
grader.grade([("$9^{9^{9^{9^9}}}$", "72")], deadline_s=1)
"""


@pytest.mark.parametrize("end", ["", "os._exit(0)", KILLED_BUSY], ids=["exit", "_exit", "killed"])
def test_workers_end_with_their_parent(tmp_path, end):
    script = tmp_path / "script.py"  # without a main guard: it must not be imported again
    script.write_text(SCRIPT + end)
    run = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=os.getcwd(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    started, pids = run.stdout.splitlines()
    assert started == "started"
    wait_until_gone([int(pid) for pid in pids.split()])


def wait_until_gone(pids):
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end, f"a math-verify process outlived its parent: {pids}"
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_missing_math_verify_is_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"No module named math_verify.*pip install math-verify"):
        MathGrader(workers=1).grade([("\\frac{1}{2}", "0.5")])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think> 8+4=12 </think> <answer> 72 </answer>", 1.0),
        ("<think></think><answer>72</answer>", 1.0),
        ("\n<think>a\nb</think>\n\n<answer>72</answer>\n", 1.0),
        ("<think> a < b </think> <answer> {} </answer>", 1.0),
        ("<think> </think> <answer> </answer>", 0.0),
        ("<answer> 72 </answer> <think> a </think>", 0.0),
        ("<think> a </think> <answer> 72 </answer> .", 0.0),
        ("so <think> a </think> <answer> 72 </answer>", 0.0),
        ("<think> a </think> so <answer> 72 </answer>", 0.0),
        ("<think> a </think> <answer> 72", 0.0),
        ("<think> a <answer> 72 </answer> </think>", 0.0),
        ("<think> a <answer> 72 </think> </answer>", 0.0),
        ("<THINK> a </THINK> <answer> 72 </answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, reward):
    assert format_reward(completion) == reward


bodies = st.text(max_size=30).filter(lambda text: not any(tag in text for tag in TAGS))
blanks = st.text(" \n\t", max_size=3)


@given(bodies, bodies.filter(str.strip), blanks, blanks, blanks, st.data())
def test_format_allows_each_tag_once_and_nothing_outside(think, answer, a, b, c, data):
    good = f"{a}<think>{think}</think>{b}<answer>{answer}</answer>{c}"
    assert format_reward(good) == 1.0
    at = data.draw(st.integers(0, len(good)))
    tag = data.draw(st.sampled_from(TAGS))
    assert format_reward(good[:at] + tag + good[at:]) == 0.0
    assert format_reward(good.replace(tag, "")) == 0.0
    outside = data.draw(st.sampled_from([0, len(a), len(good) - len(c), len(good)]))
    assert format_reward(good[:outside] + "x" + good[outside:]) == 0.0


def rollout(answer, *texts):
    prompt = Prompt(id="p", ids=(1,), answer=answer, text="?")
    samples = tuple(Completion(ids=(2,), logps=(0.0,), text=t, finish="stop") for t in texts)
    return Rollout(prompt=prompt, completions=samples, weight_version=3)


RIGHT = "<think> </think> <answer> 72 </answer>"
WRONG = "<think> </think> <answer> 71 </answer>"


def test_scores_keep_each_term_and_their_weighted_sum():
    scored = score_rollouts(
        [rollout("72", RIGHT, WRONG, "72", "71"), rollout("71", RIGHT)],
        {"accuracy": 1.0, "format": 0.1},
    )
    terms = [score.terms for one in scored for score in one.scores]
    assert [(t["accuracy"], t["format"]) for t in terms] == [(1, 1), (0, 1), (1, 0), (0, 0), (0, 1)]
    totals = [score.total for one in scored for score in one.scores]
    assert totals == pytest.approx([1.1, 0.1, 1.0, 0.0, 0.1])
    assert [len(one.scores) for one in scored] == [4, 1]
    assert scored[0].weight_version == 3
    assert all(score.failure is None for one in scored for score in one.scores)


def test_only_the_terms_with_a_weight_are_computed():
    (scored,) = score_rollouts([rollout("72", BOMB)], {"format": 2.0})
    assert scored.scores[0].terms == {"format": 0.0}


def test_failures_are_named_and_leave_their_term_out(grader):
    def moody(completion, prompt):
        return {RIGHT: 0.5, "72": math.nan}[completion.text]

    (scored,) = score_rollouts(
        [rollout("72", RIGHT, "72", BOMB)],
        {"accuracy": 1.0, "moody": 2.0},
        extra={"moody": moody, "unused": moody},
        grader=grader,
    )
    good, nan, bomb = scored.scores
    assert (good.total, good.failure) == (2.0, None)
    assert nan.terms == {"accuracy": 1.0}
    assert (nan.total, nan.failure) == (0.0, "moody: returned nan")
    assert bomb.terms == {}
    assert bomb.failure.startswith("accuracy: deadline")
    assert "moody: KeyError" in bomb.failure


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"accuracy": 1.0, "fromat": 0.1}, "unknown reward term 'fromat': did you mean 'format'"),
        ({}, "no reward terms"),
        ({"accuracy": math.nan}, "'accuracy' is nan"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        score_rollouts([rollout("72", RIGHT)], weights)


def test_the_shared_grader_is_one():
    assert shared_grader() is shared_grader()
