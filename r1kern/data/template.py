"""Prompt templates: the paper's R1-Zero template, the tokenizer's chat template, or none."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from r1kern.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Verbatim from Table 1 of DeepSeek-R1 (arXiv 2501.12948v1), where the problem stands between the
# two parts, full stop included.
R1_ZERO_PREFIX = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: "
)
R1_ZERO_SUFFIX = ". Assistant:"
TEMPLATES = ("r1-zero", "chat", "none")


def render(template: str, problem: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt text that a completion continues.

    Args:
        template: "r1-zero", "chat" (the tokenizer's own chat template, generation prompt added) or
            "none" (the problem as it is).
        problem: raw text; braces and tags in it are left as they are.

    Raises:
        UserError: the template is unknown, or "chat" with a tokenizer that has no chat template.
    """
    if template == "r1-zero":
        return R1_ZERO_PREFIX + problem.strip() + R1_ZERO_SUFFIX
    if template == "none":
        return problem
    if template != "chat":
        near = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown template '{template}': did you mean '{near}'?")
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: use template 'r1-zero' or 'none'")
    messages = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
