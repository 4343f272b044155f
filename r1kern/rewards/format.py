"""The format reward of DeepSeek-R1-Zero (arXiv 2501.12948, section 2.2.2); a response in parts."""

from __future__ import annotations

from typing import NamedTuple

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(completion: str) -> float:
    """1.0 when the completion is `<think> ... </think> <answer> ... </answer>`, else 0.0.

    Each tag occurs exactly once and in this order; outside the two blocks there is only white
    space. The answer must not be blank. The reasoning may be: the paper asks for the block, not
    for a length, and whether thinking pays is for the accuracy reward to teach.
    """
    if any(completion.count(tag) != 1 for tag in TAGS):
        return 0.0
    spans = []
    rest = completion
    for tag in TAGS:
        span, found, rest = rest.partition(tag)
        if not found:
            return 0.0
        spans.append(span)
    before, _, between, answer = spans
    outside_blank = not (before + between + rest).strip()
    return float(outside_blank and bool(answer.strip()))


class Response(NamedTuple):
    """The two parts of a completion."""

    reasoning: str  # the chain of thought; "" where there is none
    summary: str  # what the user is meant to read; "" where the reasoning was never closed


def parts(completion: str, *, opening: str = "<think>", closing: str = "</think>") -> Response:
    """Chain of thought and final summary: `opening reasoning closing summary`.

    The summary is what follows the first `closing`, without `<answer>` tags around it. The paper
    writes the cold start as `|special_token|<reasoning_process>|special_token|<summary>` (section
    2.3.1): give both arguments the same token for that. A completion without either token is all
    summary.
    """
    _, opened, rest = completion.partition(opening)
    if not opened:
        rest = completion
    reasoning, closed, summary = rest.partition(closing)
    if not closed:
        return Response(rest.strip(), "") if opened else Response("", completion.strip())
    summary = summary.strip().removeprefix("<answer>").removesuffix("</answer>")
    return Response(reasoning.strip(), summary.strip())
