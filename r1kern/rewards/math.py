"""Accuracy of mathematical answers: math-verify in killable processes, plain numbers in line.

The grader never hangs the loop (every request has a deadline after which its worker ends and is
replaced), and what it could not judge is a failure, not a wrong answer.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import re
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from r1kern.errors import UserError
from r1kern.rewards.verdict import Verdict

WALL_FACTOR = 4  # clock time allowed per second of processor time, for a loaded machine
START_S = 60.0  # importing sympy takes about a second, more on a loaded machine
QUEUE_S = 600.0
MAX_ANSWER_CHARS = 500  # a longer one is wrong unless it equals the gold text
MAX_TAIL_CHARS = 2_000  # running text is judged by its end
_WORKER = Path(__file__).with_name("_math_worker.py")


def verify(prediction: str, gold: str) -> bool:
    """Whether `prediction` gives the answer `gold`; both raw text.

    The answer of either text is its last `<answer>` block, else its last `\\boxed{}`, else what
    follows `</think>`, else the text. Never raises on any text and never hangs: False when the
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
    """A pool of warm math-verify processes.

    Args:
        workers: processes, started when first needed.
        deadline_s: seconds of processor time one judgement may take, so that a verdict does not
            depend on the machine's load; on the clock, `WALL_FACTOR` times as many.
        memory_mb: address space of a worker, MiB.

    Attributes:
        close: call it to end the workers before the grader is garbage-collected.
    """

    def __init__(self, *, workers: int = 2, deadline_s: float = 2.0, memory_mb: int = 2048):
        self.deadline_s = deadline_s
        self._workers = [_Worker(memory_mb) for _ in range(workers)]
        self._idle: queue.Queue[_Worker] = queue.Queue()
        for worker in self._workers:
            self._idle.put(worker)
        self.close = weakref.finalize(self, _stop_all, self._workers)

    def grade(
        self, pairs: Iterable[tuple[str, str]], deadline_s: float | None = None
    ) -> list[Verdict]:
        """Verdicts of (prediction, gold) pairs, in order.

        Args:
            deadline_s: processor seconds for each pair, the grader's own where None.

        Raises:
            UserError: math-verify is not installed.
        """
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        questions = [_Question.of(prediction, gold) for prediction, gold in pairs]
        verdicts = {question: _judge_plain(question) for question in questions}
        hard = [question for question, verdict in verdicts.items() if verdict is None]
        if len(hard) > 1:
            with ThreadPoolExecutor(min(len(self._workers), len(hard))) as threads:
                judged = threads.map(lambda question: self._ask(question, deadline_s), hard)
                verdicts.update(zip(hard, judged, strict=True))
        elif hard:
            verdicts[hard[0]] = self._ask(hard[0], deadline_s)
        return [verdicts[question] for question in questions]

    def _ask(self, question: _Question, deadline_s: float) -> Verdict:
        try:
            worker = self._idle.get(timeout=QUEUE_S)
        except queue.Empty:
            return Verdict(False, f"no math worker became free within {QUEUE_S:.0f} s")
        try:
            return worker.ask(question, deadline_s)
        finally:
            self._idle.put(worker)


@dataclass(frozen=True)
class _Question:
    prediction: str
    running_text: bool
    gold: str

    @classmethod
    def of(cls, prediction: str, gold: str) -> _Question:
        answer, running_text = _answer(prediction)
        return cls(answer, running_text, _answer(gold)[0])


def _answer(text: str) -> tuple[str, bool]:
    """The answer in `text`, and whether it is running text that the answer must be sought in."""
    inner, tagged = text, False
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        inner, tagged = text[start + len("<answer>") : end], True
    boxed = _last_boxed(inner)
    if boxed is not None:
        return boxed.strip(), False
    if tagged:
        return inner.strip(), False
    # A completion that opened the template and was cut off has not answered.
    rest = text.rpartition("</think>")[2]
    if "<think>" in rest or "<answer>" in rest:
        return "", False
    return rest.strip()[-MAX_TAIL_CHARS:], True


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start : start + MAX_TAIL_CHARS], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


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
    longest = MAX_TAIL_CHARS if question.running_text else MAX_ANSWER_CHARS
    if len(prediction) > longest or len(gold) > MAX_TAIL_CHARS:
        return Verdict(False)
    numbers = [_PLAIN_NUMBER.fullmatch(text) for text in (prediction, gold)]
    if not all(numbers):
        return None
    left, right = (_exact(number) for number in numbers)
    # math-verify rounds to six decimals: beyond them, whether 0.3333333 is 1/3 is for it to say.
    rounded = any(len(n["decimals"] or "") > 6 and not n["exponent"] for n in numbers)
    return None if rounded and left != right else Verdict(left == right)


def _exact(number: re.Match) -> Fraction:
    whole = number["whole"].replace(",", "")
    return Fraction(f"{whole}.{number['decimals'] or '0'}e{number['exponent'] or '0'}")


class _Worker:
    """One math-verify process; started on demand, killed when it misses a deadline."""

    def __init__(self, memory_mb: int):
        self._memory_mb = memory_mb
        self._process: subprocess.Popen | None = None
        self._owner = 0
        self._ready = False

    def ask(self, question: _Question, deadline_s: float) -> Verdict:
        if not self._is_running():
            self._start()
        if not self._ready:
            self._await_ready()
        request = {**vars(question), "deadline_s": deadline_s}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return Verdict(self._read(WALL_FACTOR * deadline_s)["correct"])
        except TimeoutError:
            failure = f"deadline: math-verify took more than {WALL_FACTOR * deadline_s:g} s"
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            failure = f"crash: the math-verify process ended with code {code}"
            if code == -signal.SIGPROF:
                failure = f"deadline: math-verify took more than {deadline_s:g} s of processor time"
        except BaseException:
            self.stop()  # else the reply to this question would be taken for the next one's
            raise
        self.stop()
        self._start()  # warm again by the time it is asked
        return Verdict(False, failure)

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

    def _start(self) -> None:
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
        self._ready = False

    def _await_ready(self) -> None:
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
        """The next reply. Raises TimeoutError past the deadline, EOFError when the process ends."""
        end = time.monotonic() + deadline_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise EOFError
                line += chunk
        return json.loads(line)


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
