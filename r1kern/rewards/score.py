"""From rollouts to scores: every reward term by name, and their weighted sum.

A `Scorer` grades in the background, so that a group is judged while others are still sampled.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from r1kern.config import Grading
from r1kern.errors import UserError
from r1kern.rewards.code import CodeGrader
from r1kern.rewards.format import format_reward, parts
from r1kern.rewards.judge import JudgeClient
from r1kern.rewards.language import consistency
from r1kern.rewards.length import overlong, repetition
from r1kern.rewards.math import MathGrader, shared_grader
from r1kern.rewards.programs.tests import read_tests
from r1kern.rewards.verdict import Verdict
from r1kern.types import Completion, Prompt, Rollout, Score

Reward = Callable[[Completion, Prompt], float]


class Scorer:
    """Computes the terms that have a weight, in the order in which rollouts come.

    - accuracy: 1 when the completion is right, else 0. By the prompt's task: mathematics and
      multiple choice by `rewards.math`, programs by their tests in a sandbox, "reference" by a
      judge that is given the answer; "general" prompts have no such term.
    - format: 1 for the R1-Zero template, else 0 (`rewards.format`).
    - language: share of target-language words in the chain of thought (arXiv 2501.12948, section
      2.3.2), in [0, 1].
    - overlong, repetition: penalties in [-1, 0] (`rewards.length`).
    - terms of one's own, and those of reward models, which are added later (`later`).

    A term whose grader failed is left out of `Score.terms`; the score then names the failure and
    its total is 0, to be left out of the update.

    Args:
        weights: of each term in the total (the paper sums them directly).
        options: how the terms judge.
        max_tokens: budget of a completion, for the overlong penalty.
        extra: rewards of one's own, by name, called in one background thread; an exception or a
            value that is not finite is a failure of that completion's grader.
        later: terms that somebody else adds.
        grader: judges mathematics; the process-wide one by default.

    Raises:
        UserError: `weights` is empty or names a term that nobody computes.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        options: Grading | None = None,
        max_tokens: int = 0,
        extra: Mapping[str, Reward] | None = None,
        later: Iterable[str] = (),
        grader: MathGrader | None = None,
    ):
        options = options or Grading()
        self._weights, self._options = dict(weights), options
        self._terms = _rules(options, max_tokens) | dict(extra or {})
        _check_terms(weights, {"accuracy", *self._terms, *later})
        self._math, self._code, self._judge = grader, None, None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="r1kern-score")

    def prepare(self, prompts: Iterable[Prompt]) -> None:
        """Build and try the graders that these prompts need, before anything long is started.

        Raises:
            UserError: no sandbox for programs, or a test that cannot be read; no judge, or it
                cannot be reached.
        """
        if "accuracy" not in self._weights:
            return
        by_task: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            by_task.setdefault(prompt.task, []).append(prompt)
        for prompt in by_task.get("code", ()):
            try:
                read_tests(_tests(prompt))
            except UserError as error:
                raise UserError(f"prompt '{prompt.id}': {error}") from error
        if "code" in by_task:
            self._coder().check()
        if "reference" in by_task:
            self._judge_client().check()

    def submit(self, rollout: Rollout) -> Future[Rollout]:
        """The rollout with one `Score` per completion, as soon as it is graded."""
        verdicts = self._verdicts(rollout) if "accuracy" in self._weights else None
        return self._thread.submit(self._score, rollout, verdicts)

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts graded, waiting for all of them."""
        return [pending.result() for pending in [self.submit(rollout) for rollout in rollouts]]

    def _verdicts(self, rollout: Rollout) -> Callable[[], list[Verdict]] | None:
        """Starts judging accuracy; a function that waits for it.  None where there is no answer."""
        prompt, completions = rollout.prompt, rollout.completions
        if prompt.task == "general":
            return None
        if prompt.task == "code":
            coder, tests = self._coder(), _tests(prompt)
            pending = [coder.submit(c.text, tests) for c in completions]
        elif prompt.task == "reference":
            judge = self._judge_client()
            pending = [judge.submit(prompt.question, prompt.answer, c.text) for c in completions]
        else:
            grader = self._math or shared_grader()
            pairs = [(c.text, prompt.answer) for c in completions]
            return lambda: grader.grade(pairs, self._options.deadline_s)
        return lambda: [verdict.result() for verdict in pending]

    def _coder(self) -> CodeGrader:
        if self._code is None:
            self._code = CodeGrader(self._options.sandbox)
        return self._code

    def _judge_client(self) -> JudgeClient:
        if self._options.judge is None:
            raise UserError(
                "some prompts have task 'reference', which only a judge can grade: set "
                "grading.judge.url and grading.judge.model"
            )
        if self._judge is None:
            self._judge = JudgeClient(self._options.judge)
        return self._judge

    def _score(self, rollout: Rollout, verdicts: Callable[[], list[Verdict]] | None) -> Rollout:
        judged = verdicts() if verdicts else [None] * len(rollout.completions)
        scores = [
            self._score_one(completion, rollout.prompt, verdict)
            for completion, verdict in zip(rollout.completions, judged, strict=True)
        ]
        return dataclasses.replace(rollout, scores=tuple(scores))

    def _score_one(self, sample: Completion, prompt: Prompt, verdict: Verdict | None) -> Score:
        terms: dict[str, float] = {}
        failures = []
        if verdict is not None and verdict.failure is None:
            terms["accuracy"] = float(verdict.correct)
        elif verdict is not None:
            failures.append(f"accuracy: {verdict.failure}")
        for name, term in self._terms.items():
            if name not in self._weights:
                continue
            try:
                value = float(term(sample, prompt))
            except Exception as error:  # whatever a user's grader raises is that grader's failure
                failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if math.isfinite(value):
                terms[name] = value
            else:
                failures.append(f"{name}: returned {value}")
        if failures:
            return Score(terms, 0.0, "; ".join(failures))
        return Score(terms, weighted(terms, self._weights))


def _tests(prompt: Prompt) -> list:
    return [json.loads(test) for test in prompt.tests]


def weighted(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The total of a completion's terms."""
    return sum(weights[name] * value for name, value in terms.items())


def score_rollouts(
    rollouts: Sequence[Rollout], weights: Mapping[str, float], **options
) -> list[Rollout]:
    """The rollouts with one `Score` per completion; arguments and errors as of `Scorer`."""
    return Scorer(weights, **options).score(rollouts)


def _rules(options: Grading, max_tokens: int) -> dict[str, Reward]:
    """The rule-based terms but accuracy."""
    return {
        "format": lambda sample, prompt: format_reward(sample.text),
        "language": lambda sample, prompt: consistency(
            parts(sample.text).reasoning, options.language or prompt.language or "en"
        ),
        "overlong": lambda sample, prompt: overlong(
            len(sample.ids), max_tokens=max_tokens, buffer=options.overlong_buffer
        ),
        "repetition": lambda sample, prompt: repetition(
            sample.text, ngram=options.repetition_ngram
        ),
    }


def _check_terms(weights: Mapping[str, float], known: set[str]) -> None:
    if not weights:
        raise UserError(f"no reward terms: give a weight to at least one of {sorted(known)}")
    for name, weight in weights.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown reward term '{name}': did you mean '{near}'?")
        if not math.isfinite(weight):
            raise UserError(f"the weight of reward term '{name}' is {weight}: give a finite number")
