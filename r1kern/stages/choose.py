"""Which sampled completions become training data, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from r1kern.config.pipeline import Readable
from r1kern.rewards.format import parts
from r1kern.rewards.readable import Limits, why_unreadable
from r1kern.types import Completion, Prompt, Rollout


def choose(
    rollouts: Iterable[Rollout], limits: Readable, *, keep: int
) -> tuple[list[tuple[Prompt, Completion]], Counter]:
    """The correct and readable completions, at most `keep` different ones a prompt.

    Paper, sections 2.3.1 and 2.3.3: only correct responses are retained; mixed languages, long
    paragraphs and code blocks are filtered out.

    Returns:
        The chosen ones, and how many were dropped by reason.
    """
    chosen, dropped = [], Counter()
    for rollout in rollouts:
        seen: set[str] = set()
        for completion, score in zip(rollout.completions, rollout.scores, strict=True):
            reason = _why_not(rollout.prompt, completion, score, limits)
            if reason is None and completion.text in seen:
                reason = "repeated"
            if reason is None and len(seen) == keep:
                reason = "more than needed"
            if reason is None:
                seen.add(completion.text)
                chosen.append((rollout.prompt, completion))
            else:
                dropped[reason] += 1
    return chosen, dropped


def _why_not(prompt: Prompt, completion: Completion, score, limits: Readable) -> str | None:
    if score.failure is not None:
        return "grader failed"
    if completion.finish == "length":
        return "unfinished"
    if score.terms.get("accuracy") != 1.0:
        return "wrong"
    if not parts(completion.text).reasoning:
        return "no reasoning"
    return unreadable(completion, prompt, limits)


def unreadable(completion: Completion, prompt: Prompt, limits: Readable) -> str | None:
    """Why a completion cannot be read, None where it can."""
    return why_unreadable(
        completion.text,
        language=prompt.language or limits.language,
        limits=Limits(**limits.model_dump(exclude={"language"})),
    )


def in_format(text: str, tags: tuple[str, str]) -> str:
    """A completion as `opening reasoning closing summary` with one's own tags (section 2.3.1)."""
    if tags == ("<think>", "</think>"):
        return text
    response = parts(text)
    return f"{tags[0]}{response.reasoning}{tags[1]}{response.summary}"
