import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import math_cases
import math_cases_blind
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r1kern.errors import UserError
from r1kern.rewards.equivalence.equal import equivalent
from r1kern.rewards.math import MathGrader, Verdict, shared_grader, verify

CASES = {**math_cases.CASES, **math_cases_blind.CASES}
# Beyond our grammar, so that math-verify works on it for ever, in one long C call at the end.
BOMB = r"$\prod_{k=1}^{1000000} k!$"


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


@pytest.mark.parametrize("kind", CASES)
def test_answers_are_judged_by_what_they_mean(grader, kind):
    equal, different = CASES[kind]
    verdicts = grader.grade([*equal, *different])
    wrong = [
        (pair, verdict)
        for n, (pair, verdict) in enumerate(zip([*equal, *different], verdicts, strict=True))
        if verdict != Verdict(n < len(equal))
    ]
    assert wrong == []


def test_answers_within_text_are_judged_by_what_they_mean(grader):
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


@settings(max_examples=100, deadline=None)
@given(any_text | mathematical, mathematical)
@example("{" * 700, "72")
@example("-" * 700, "72")
@example("\\frac" * 299 + "1", "72")
@example("1" * 399 + "!", "72")
@example("x" + "^9" * 299, "x")
@example("\\log_{1}{5}", "\\log_1{2}")
@example("0^{-x}", "0^{x}")
@example("2_{" + "9" * 300 + "}", "2")
def test_no_text_makes_the_grammar_raise(left, right):
    assert equivalent(left, right) in (True, False, None)
    assert equivalent(right, left) in (True, False, None)


@settings(max_examples=60, deadline=None)
@given(wrappers, any_text | mathematical)
def test_no_text_makes_verify_raise(grader, wrapper, text):
    for verdict in grader.grade([(wrapper.format(text), "72"), ("72", wrapper.format(text))]):
        assert isinstance(verdict.correct, bool)
        assert not (verdict.correct and verdict.failure)


ATTACKS = {
    "tower of python powers": "9**9**9**9",
    "tower of powers": "$9^{9^{9^{9^9}}}$",
    "boxed tower": "\\boxed{9^{9^{9^{9^9}}}}",
    "huge power": "10^(10^10)",
    "small power": "10^{-10^{10}}",
    "power of a root": "\\sqrt{2}^{9^{9^9}}",
    "factorial": "$100000000!$",
    "factorials": "9!!!!!!!!",
    "binomial": "\\binom{10^9}{5 \\cdot 10^8}",
    "exponential": "e^{e^{e^{e^{e^e}}}}",
    "logarithm of a tower": "\\ln 9^{9^{9^9}}",
    "sine of a tower": "\\sin(10^{10^5})",
    "product": BOMB,
    "sum": "$\\sum_{n=1}^{10^9} n^7$",
    "integral": "\\int_0^1 \\frac{\\sin^{50} x \\ln(1+x^{31})}{\\cos x + x^{17}}\\,dx",
    "limit": "\\lim_{x\\to 0} \\frac{\\sin^{40} x^{30} - \\tan^{31} x}{x^{90}}",
    "matrix": "\\begin{vmatrix}"
    + "\\\\".join("&".join("x" * 60) for _ in range(5))
    + "\\end{vmatrix}",
    "power of a sum": "(a+b+c+d+e+f)^{100000}",
    "signs": "\\pm 1" * 250,
    "braces": "{" * 2_000,
    "closing braces": "}" * 2_000,
    "bars": "|" * 480 + "1",
    "words": "\\boxed{" + "a " * 240 + "!}",
    "units": "\\boxed{1" + " m s" * 120 + "}",
    "assertions": "answer is " * 200_000,
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
    for pair in ((attack, "72"), ("72", attack)):
        started = time.monotonic()
        assert not grader.grade([pair])[0].correct
        assert time.monotonic() - started < 2.0
    assert grader.grade([("\\frac{1}{2}", "0.5")]) == [Verdict(True)]


def test_a_batch_of_attacks_holds_up_neither_the_loop_nor_the_others(grader):
    grader.grade([("\\frac{1}{2}", "0.5")])
    processes = [worker._process.pid for worker in grader._workers]
    attacks = [(BOMB, str(n)) for n in range(24)]
    good = [(f"\\frac{{{n}}}{{2}}", str(n / 2)) for n in range(1, 24)]
    mixed = [pair for pairs in zip(attacks[1:], good, strict=True) for pair in pairs]
    started = time.monotonic()
    verdicts = grader.grade(mixed, batch_deadline_s=10)
    assert time.monotonic() - started < 10 + 10  # a worker's start on a loaded machine
    assert verdicts[1::2] == [Verdict(True)] * len(good)
    assert all(verdict.failure for verdict in verdicts[::2])
    # Judges were replaced; the processes that hold the imports live on.
    assert [worker._process.pid for worker in grader._workers] == processes
    late = grader.grade(attacks, batch_deadline_s=0.5)
    assert {verdict.failure for verdict in late} >= {"deadline: the batch took more than 0.5 s"}
    assert grader.grade(good[:4]) == [Verdict(True)] * 4


def test_a_grader_failure_is_not_a_wrong_answer(grader):
    late, wrong = grader.grade([(BOMB, "72"), ("71", "72")], deadline_s=0.5)
    assert not late.correct
    assert late.failure.startswith("deadline: the judgement took more than 0.")
    assert wrong == Verdict(False)
    assert not verify(BOMB, "72")


def test_a_worker_that_sleeps_is_replaced_and_its_late_reply_is_not_the_next_ones():
    grader = MathGrader(workers=1)
    hard = ("\\frac{1}{2}", "0.5")
    assert grader.grade([hard], deadline_s=10) == [Verdict(True)]
    holder = grader._workers[0]._process.pid
    judge = judge_of(holder)
    os.kill(judge, signal.SIGSTOP)  # uses no processor time, and its timers do not fire
    started = time.monotonic()
    asleep = grader.grade([hard], deadline_s=0.5)[0]
    assert asleep == Verdict(False, "deadline: the judgement took more than 0.85 s")
    assert time.monotonic() - started < 0.85 + 5
    # It wakes to two requests at once: the overdue one and the next.
    threading.Timer(0.5, os.kill, (judge, signal.SIGCONT)).start()
    assert grader.grade([("\\frac{1}{2}", "0.6")], deadline_s=10) == [Verdict(False)]
    os.kill(judge_of(holder), signal.SIGSTOP)
    assert all(grader.grade([hard], deadline_s=0.2)[0].failure for _ in range(2))
    assert grader.grade([hard], deadline_s=10) == [Verdict(True)]
    assert grader._workers[0]._process.pid != holder
    grader.close()


def judge_of(holder):
    with open(f"/proc/{holder}/task/{holder}/children") as file:
        return int(file.read())


def test_a_worker_that_dies_is_replaced():
    grader = MathGrader(workers=1)
    hard = ("\\frac{1}{2}", "0.5")
    assert grader.grade([hard]) == [Verdict(True)]
    os.kill(grader._workers[0]._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert grader.grade([hard]) == [Verdict(True)]  # died idle

    judge = judge_of(grader._workers[0]._process.pid)
    threading.Timer(0.5, os.kill, (judge, signal.SIGKILL)).start()
    died = grader.grade([(BOMB, "72")], deadline_s=30)[0]
    assert died == Verdict(False, "crash: the judging process ended with code -9")
    assert grader.grade([hard]) == [Verdict(True)]

    holder = grader._workers[0]._process.pid
    threading.Timer(0.5, os.kill, (holder, signal.SIGKILL)).start()
    died = grader.grade([(BOMB, "72")], deadline_s=30)[0]
    assert died == Verdict(False, "crash: the judging process ended with code -9")
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
            grader.grade([(BOMB, "0")], deadline_s=60)
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
grader.grade([("\\prod_{k=1}^{1000000} k!", "72")], deadline_s=1)
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


def test_the_shared_grader_is_one():
    assert shared_grader() is shared_grader()
