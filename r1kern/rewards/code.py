"""The code reward: a program runs against predefined tests, away from their expected outputs.

Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2: "a compiler can be used to generate feedback
based on predefined test cases". The paper says no more; everything below is ours.

Standard input tests: the program gets the input alone, its output is compared here. Calls,
assertions and test programs run in a second sandbox, whose candidate functions ask the program's
sandbox for plain data (`_code_checker` and `_code_program` in `programs`). So there is nothing to
read, and a forged message is no more than a returned value. `programs.tests` lists the forms of a
test.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from r1kern.config import Sandbox
from r1kern.errors import UserError
from r1kern.rewards.format import parts
from r1kern.rewards.programs.job import Job
from r1kern.rewards.programs.sandbox import Limits
from r1kern.rewards.programs.tests import read_tests
from r1kern.rewards.verdict import Verdict

LANGUAGES = dict.fromkeys(("python", "python3", "py"), "python")
LANGUAGES |= dict.fromkeys(("cpp", "c++", "cc", "cxx"), "cpp")


@dataclass(frozen=True)
class CodeResult:
    """How a program did.

    Attributes:
        passed, total: number of tests.
        error: why the first failed test failed, such as "timeout in test 3", or None.
    """

    passed: int
    total: int
    error: str | None = None


def run_tests(
    program: str,
    tests: list,
    *,
    timeout_s: float = 6.0,
    memory_mb: int = 512,
    language: str = "python",
    unsafe_local: bool = False,
    site_packages: bool = False,
    entry_point: str | None = None,
    stop_at_failure: bool = False,
) -> CodeResult:
    """Runs `program` against `tests` in a sandbox.  Thread-safe; nothing is left behind.

    Args:
        program: its source.
        tests: in any form of `programs.tests`.
        timeout_s: seconds on the clock for loading the program and for each test.
        memory_mb: address space of the program, MiB.
        language: "python" or "cpp" (standard input tests only).
        unsafe_local: without bubblewrap, as this user; for machines that have no sandbox.
        site_packages: programs and tests may import our installed packages.
        entry_point: the function of tests that name none; where None, the method of the class
            `Solution`, else the last function defined.
        stop_at_failure: leave the tests after the first failed one out (they count as failed).

    Raises:
        UserError: a test that cannot be understood, no sandbox, no compiler, bad argument.
            Whatever the program does is a result.
    """
    if LANGUAGES.get(language.lower()) is None:
        raise UserError(f"language {language!r}: programs are tested in python or cpp")
    if not (math.isfinite(timeout_s) and timeout_s > 0 and memory_mb > 0):
        raise UserError(f"timeout_s = {timeout_s}, memory_mb = {memory_mb}: give positive numbers")
    read = read_tests(tests, entry_point)
    if not read:
        raise UserError("there is no test: a program cannot be right or wrong")
    limits = Limits(
        memory_mb,
        cpu_s=timeout_s * (len(read) + 1),
        unsafe_local=unsafe_local,
        site_packages=site_packages,
    )
    source = program.encode("utf-8", "surrogatepass")
    job = Job(source, read, timeout_s, limits, stop_at_failure)
    if LANGUAGES[language.lower()] == "cpp":
        job.run_cpp()
    else:
        job.run_python()
    passed = sum(error is None for error in job.errors.values())
    failed = [(index, error) for index, error in sorted(job.errors.items()) if error]
    return CodeResult(passed, len(read), _placed(*failed[0]) if failed else None)


def _placed(index: int, error: str) -> str:
    """An error with the number of its test: `wrong answer in test 3: ...`."""
    what, colon, detail = error.partition(": ")
    if what in ("syntax error", "compile error"):
        return error
    return f"{what} in test {index + 1}{colon}{detail}"


class CodeGrader:
    """Verdicts on completions that hold a program, given in the background.

    Args:
        options: limits of a program; how many are tested at the same time.

    A program is right when it passes every test. Thread-safe.
    """

    def __init__(self, options: Sandbox | None = None):
        self.options = options or Sandbox()
        workers = self.options.workers or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="code-grader")

    def __enter__(self) -> CodeGrader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def check(self) -> None:
        """Test a program, to find out before there are any.

        Raises:
            UserError: there is no sandbox, or it does not work here; the message has the remedy.
        """
        result = run_tests(
            "def f():\n    return 1\n",
            ["assert f() == 1"],
            timeout_s=60.0,
            unsafe_local=self.options.unsafe_local,
        )
        if result.passed != 1:
            raise UserError(
                f"the sandbox does not run a program here ({result.error}): see `r1kern doctor`, "
                "or set grading.sandbox.unsafe_local to run programs with your own rights"
            )

    def submit(self, completion: str, tests: Iterable) -> Future[Verdict]:
        """The verdict to come.  Never raises: what cannot be judged is a failure.

        Args:
            completion: text of the whole completion.
            tests: as `run_tests` takes them; a text that is JSON is read first.
        """
        return self._pool.submit(self._judge, completion, list(tests))

    def grade(self, items: Iterable[tuple[str, Iterable]]) -> list[Verdict]:
        """Verdicts of (completion, tests), in order."""
        futures = [self.submit(completion, tests) for completion, tests in items]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the workers after the programs that run; those that wait are given up."""
        self._pool.shutdown(cancel_futures=True)

    def _judge(self, completion: str, tests: list) -> Verdict:
        program, language = program_of(completion)
        if not program.strip():
            return Verdict(False)
        try:
            result = run_tests(
                program,
                [_from_json(test) for test in tests],
                timeout_s=self.options.timeout_s,
                memory_mb=self.options.memory_mb,
                language=language,
                unsafe_local=self.options.unsafe_local,
                site_packages=self.options.site_packages,
                stop_at_failure=True,
            )
        except (UserError, OSError) as error:  # OSError: no memory or descriptors for a sandbox
            return Verdict(False, f"code: {error}")
        return Verdict(result.passed == result.total)


def _from_json(test):
    if not isinstance(test, str):
        return test
    try:
        return json.loads(test)
    except ValueError:
        return test


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCED = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def program_of(completion: str) -> tuple[str, str]:
    """The program of a completion and its language, "python" where nothing says otherwise.

    Sought in what follows `</think>`, there inside the last `<answer>`: the last fenced block
    labelled as Python or C++, else the last unlabelled one, else the whole text.
    """
    text = parts(completion).summary
    answers = _ANSWER.findall(text)
    text = answers[-1] if answers else text
    blocks = [(label.strip().lower(), code) for label, code in _FENCED.findall(text)]
    labelled = [(LANGUAGES[label], code) for label, code in blocks if label in LANGUAGES]
    if labelled:
        return labelled[-1][1], labelled[-1][0]
    plain = [code for label, code in blocks if not label]
    return (plain[-1] if plain else text), "python"
