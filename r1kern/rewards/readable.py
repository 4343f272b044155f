"""What makes a completion unreadable.

The filters are those of DeepSeek-R1's cold start (arXiv 2501.12948, section 2.3.1: a pattern with a
summary, not-reader-friendly responses dropped) and of its rejection sampling (section 2.3.3: mixed
languages, long paragraphs and code blocks dropped). The paper gives no thresholds; these are ours,
as are the reasons "repetition" and "unfinished".
"""

from __future__ import annotations

from dataclasses import dataclass

from r1kern.rewards.format import parts
from r1kern.rewards.language import consistency
from r1kern.rewards.length import repetition
from r1kern.rewards.prose import has_code_block


@dataclass(frozen=True)
class Limits:
    """What is still readable.

    Attributes:
        consistency: least share of words in the wanted language, of reasoning and of summary.
        paragraph: characters of a line at most.
        repetition: largest share of repeated n-grams.
        ngram: their length in words.
        code_blocks: whether the reasoning may hold code blocks.
    """

    consistency: float = 0.9
    paragraph: int = 2_000
    repetition: float = 0.3
    ngram: int = 8
    code_blocks: bool = False


def why_unreadable(completion: str, *, language: str, limits: Limits | None = None) -> str | None:
    """The first reason to drop the completion, or None.

    In this order: "unfinished" (a block was opened and not closed), "no summary", "code block",
    "long paragraph", "repetition", "mixed languages". Code, paragraphs and repetition are judged in
    the chain of thought, as the paper does; where there is none, in the whole completion.

    Args:
        language: a code as in `r1kern.rewards.language.consistency`.

    Raises:
        UserError: the language is unknown, or wordfreq is not installed.
    """
    limits = limits or Limits()
    if any(completion.count(f"<{tag}>") > completion.count(f"</{tag}>") for tag in TAGGED):
        return "unfinished"
    reasoning, summary = parts(completion)
    if not summary:
        return "no summary"
    thought = reasoning or summary
    if not limits.code_blocks and has_code_block(thought):
        return "code block"
    if any(len(line) > limits.paragraph for line in thought.splitlines()):
        return "long paragraph"
    if -repetition(thought, ngram=limits.ngram) > limits.repetition:
        return "repetition"
    spoken = [part for part in (reasoning, summary) if part]
    if any(consistency(part, language) < limits.consistency for part in spoken):
        return "mixed languages"
    return None


TAGGED = ("think", "answer")
