"""The format reward of DeepSeek-R1-Zero (arXiv 2501.12948, section 2.2.2)."""

from __future__ import annotations

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
