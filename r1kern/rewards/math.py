r"""Accuracy of mathematical answers: equivalence, judged in killable processes.

The answer of either text is found by `math_answer.final_answer` and judged by what it means
(`equivalence`); what that grammar leaves out (sums, integrals, limits) math-verify judges. Plain
numbers and equal texts are settled in line. The grader never hangs the loop: each judgement and
each batch has a deadline, and what could not be judged is a failure, not a wrong answer.

Conventions, all on the side of refusing:
    - Decimals are exact: 0.333 is not 1/3 and 3.14 not pi; one of six places or more stands for
      what it rounds (0.3333333 is 1/3).
    - 50% is 0.5 and also 50; a unit may be left out, but two units must agree (500 cm is 5 m,
      5 m is not 5 cm; 90 degrees are not pi/2).
    - `1, 2` is a set or list in any order, `(1, 2)` a point or open interval, in order; `3 or 4`
      and any list that merely contains the answer are wrong.
    - `x = 5` and `y = 2x + 3` may leave their name out. Variables keep their names.
    - `log` is natural; roots of odd order are real; names without a sign restriction count as real.
    - 101_2 answers 5, but 101 does not answer 101_2.
    - The last box counts, a listing of boxes (`\\boxed{1} and \\boxed{2}`) as a list; a box that
      is not closed is no answer.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import queue
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from r1kern.errors import UserError
from r1kern.rewards.math_answer import MAX_TAIL_CHARS, final_answer
from r1kern.rewards.verdict import Verdict

WALL_FACTOR = 1.7  # clock time allowed per second of processor time
GRACE_S = 0.2  # after which a worker that did not even report its judge's death is ended
FIRST_SLICE_S = 0.03  # processor time of a first try, so that hard ones do not hold up a batch
BATCH_S = 10.0
BATCH_S_PER_PAIR = 0.05
START_S = 180.0  # importing sympy takes three seconds of processor time; a loaded machine, minutes
MAX_ANSWER_CHARS = 500  # a longer one is wrong unless it equals the gold text
_WORKER = Path(__file__).with_name("_math_worker.py")


def verify(prediction: str, gold: str) -> bool:
    """Whether `prediction` gives the answer `gold`; both raw text.

    Never raises on any text and answers within two seconds once the workers run: False when the
    grader fails (`MathGrader.grade` tells a failure from a wrong answer). Safe from any thread.

    Raises:
        UserError: math-verify is not installed.
    """
    return shared_grader().grade([(prediction, gold)])[0].correct


@functools.cache
def shared_grader() -> MathGrader:
    """The process-wide grader; its workers start with the first answer that needs them."""
    return MathGrader()


class MathGrader:
    """A pool of warm judging processes.

    Args:
        workers: processes, started when first needed.
        deadline_s: seconds of processor time one judgement may take, so that a verdict hardly
            depends on the machine's load; on the clock, `WALL_FACTOR` times as many.
        memory_mb: address space of a worker, MiB.

    Attributes:
        close: call it to end the workers before the grader is garbage-collected.
    """

    def __init__(self, *, workers: int = 2, deadline_s: float = 1.0, memory_mb: int = 2048):
        self.deadline_s = deadline_s
        self._workers = [_Worker(memory_mb) for _ in range(workers)]
        self._started_by = 0
        self._starting = threading.Lock()
        self._idle: queue.Queue[_Worker] = queue.Queue()
        for worker in self._workers:
            self._idle.put(worker)
        self.close = weakref.finalize(self, _stop_all, self._workers)

    def grade(
        self,
        pairs: Iterable[tuple[str, str]],
        deadline_s: float | None = None,
        batch_deadline_s: float | None = None,
    ) -> list[Verdict]:
        """Verdicts of (prediction, gold) pairs, in order.

        Args:
            deadline_s: processor seconds for each pair, the grader's own where None.
            batch_deadline_s: seconds on the clock for all of them, after which the pairs left
                are failures; where None, `BATCH_S` and `BATCH_S_PER_PAIR` for each pair.

        Raises:
            UserError: math-verify is not installed.
        """
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        questions = [_Question(final_answer(p), final_answer(gold)) for p, gold in pairs]
        verdicts = {question: _judge_plain(question) for question in questions}
        hard = [question for question, verdict in verdicts.items() if verdict is None]
        if not hard:
            return [verdicts[question] for question in questions]
        if batch_deadline_s is None:
            batch_deadline_s = BATCH_S + BATCH_S_PER_PAIR * len(hard)
        self._start()
        batch = _Batch(time.monotonic() + batch_deadline_s, batch_deadline_s, deadline_s)
        slices = (min(FIRST_SLICE_S, deadline_s), deadline_s) if len(hard) > 1 else (deadline_s,)
        for processor_s in slices:
            verdicts.update(zip(hard, self._ask_all(hard, batch, processor_s), strict=True))
            hard = [question for question in hard if verdicts[question].failure]
        return [verdicts[question] for question in questions]

    def _ask_all(self, hard: list[_Question], batch: _Batch, processor_s: float) -> list[Verdict]:
        if len(hard) <= 1:
            return [self._ask(question, batch, processor_s) for question in hard]
        with ThreadPoolExecutor(min(len(self._workers), len(hard))) as threads:
            return list(threads.map(lambda q: self._ask(q, batch, processor_s), hard))

    def _ask(self, question: _Question, batch: _Batch, processor_s: float) -> Verdict:
        late = Verdict(False, f"deadline: the batch took more than {batch.deadline_s:g} s")
        left_s = batch.end - time.monotonic()
        if left_s <= 0:
            return late
        try:
            worker = self._idle.get(timeout=left_s)
        except queue.Empty:
            return late
        try:
            left_s = max(0.01, batch.end - time.monotonic())
            return worker.ask(question, processor_s, min(WALL_FACTOR * batch.pair_s, left_s))
        finally:
            self._idle.put(worker)

    def _start(self) -> None:
        """Start the workers, all at once, where this process has not yet."""
        with self._starting:
            if self._started_by != os.getpid():
                for worker in self._workers:
                    worker.start()
                for worker in self._workers:
                    worker.await_ready()
                self._started_by = os.getpid()


@dataclass(frozen=True)
class _Question:
    prediction: str
    gold: str


@dataclass(frozen=True)
class _Batch:
    end: float  # time.monotonic()
    deadline_s: float
    pair_s: float  # processor seconds


_PLAIN_NUMBER = re.compile(
    r"\$?(?P<whole>[+-]?(?:\d{1,3}(?:,\d{3}){1,20}|\d{1,64}))"
    r"(?:\.(?P<decimals>\d{0,64}))?(?:[eE](?P<exponent>[+-]?\d{1,2}))?\.?\$?",
    re.ASCII,
)


def _judge_plain(question: _Question) -> Verdict | None:
    """The verdict where exact arithmetic or equal text settles it, else None."""
    prediction, gold = question.prediction, question.gold
    if not prediction or not gold:
        return Verdict(False)
    if prediction == gold:
        return Verdict(True)
    if len(prediction) > MAX_ANSWER_CHARS or len(gold) > MAX_TAIL_CHARS:
        return Verdict(False)
    numbers = [_PLAIN_NUMBER.fullmatch(text) for text in (prediction, gold)]
    if not all(numbers):
        return None
    left, right = (_exact(number) for number in numbers)
    # Whether a long decimal stands for what it rounds is for `equivalence.value` to say.
    rounded = any(len(n["decimals"] or "") > 6 and not n["exponent"] for n in numbers)
    return None if rounded and left != right else Verdict(left == right)


def _exact(number: re.Match) -> Fraction:
    whole = number["whole"].replace(",", "")
    return Fraction(f"{whole}.{number['decimals'] or '0'}e{number['exponent'] or '0'}")


class _Worker:
    """One judging process; killed and started again when it does not even report a death."""

    def __init__(self, memory_mb: int):
        self._memory_mb = memory_mb
        self._process: subprocess.Popen | None = None
        self._owner = 0
        self._ready = False
        self._overdue = False
        self._unread = b""
        self._ids = itertools.count(1)

    def ask(self, question: _Question, processor_s: float, wall_s: float) -> Verdict:
        if not self._is_running():
            self.start()
        self.await_ready()
        limits = {"id": next(self._ids), "processor_s": processor_s, "wall_s": wall_s}
        try:
            self._process.stdin.write(json.dumps(vars(question) | limits).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._read_reply(limits["id"], wall_s + GRACE_S)
            self._overdue = False
        except TimeoutError:
            # Once may be the machine's load; the late reply carries its request's number.
            reply = {"died": -signal.SIGALRM}
            if self._overdue:
                self.start()
            self._overdue = True
        except (EOFError, BrokenPipeError):
            reply = {"died": self._process.wait()}
            self.start()  # warm again by the time it is asked
        except BaseException:
            self.stop()  # a request half written would garble the next one
            raise
        if "correct" in reply:
            return Verdict(reply["correct"])
        return Verdict(False, _cause(reply["died"], processor_s, wall_s))

    def _read_reply(self, number: int, deadline_s: float) -> dict:
        end = time.monotonic() + deadline_s
        while True:
            reply = self._read(end - time.monotonic())
            if reply["id"] == number:
                return reply

    def stop(self) -> None:
        # A forked copy of this object must not end its parent's process.
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        self._process = None

    def _is_running(self) -> bool:
        return (
            self._process is not None
            and self._owner == os.getpid()
            and self._process.poll() is None
        )

    def start(self) -> None:
        self.stop()
        # -P: the folder of the script holds a math.py and must not shadow the standard library.
        # Its own process group: Ctrl-C is for the trainer, which ends the worker by closing stdin.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            process_group=0,
        )
        self._owner = os.getpid()
        self._ready = self._overdue = False
        self._unread = b""

    def await_ready(self) -> None:
        if self._ready:
            return
        try:
            hello = self._read(START_S)
        except (TimeoutError, EOFError):
            self.stop()
            raise UserError(
                f"the math-verify process did not start within {START_S:.0f} s: "
                f"try `{sys.executable} -c 'import math_verify'`"
            ) from None
        if "missing" in hello:
            self.stop()
            raise UserError(f"{hello['missing']}: install it with `pip install math-verify`")
        self._ready = True

    def _read(self, deadline_s: float) -> dict:
        """The next message. Raises TimeoutError when late, EOFError when the process ends."""
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:  # a late reply and the next may come together
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise EOFError
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def _cause(code: int, processor_s: float, wall_s: float) -> str:
    if code == -signal.SIGPROF:
        return f"deadline: the judgement took more than {processor_s:g} s of processor time"
    if code == -signal.SIGALRM:
        return f"deadline: the judgement took more than {wall_s:.3g} s"
    return f"crash: the judging process ended with code {code}"


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
