"""How a reward model reads a response; preferences as token sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from r1kern.data.template import render
from r1kern.errors import UserError
from r1kern.rewards.format import TAGS, parts
from r1kern.types import Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reads = Literal["summary", "response"]


@dataclass(frozen=True)
class Reading:
    """How a reward model reads a problem and a response, alike in training and in scoring.

    The rendered problem, the response's text or the final summary in it, and the end-of-sequence
    token, whose value is the score.  A response whose reasoning was never closed has an empty
    summary.

    Attributes:
        template: as in `template.render`.
        reads: the paper's helpfulness model reads the final summary only, its harmlessness model
            the whole response (arXiv 2501.12948, section 2.3.4).
    """

    template: str
    reads: Reads

    def text(self, response: str) -> str:
        """What is read of a response."""
        return parts(response).summary if self.reads == "summary" else response

    def sequences(
        self, samples: Seq[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
    ) -> list[Sequence]:
        """(problem, response) pairs as sequences of one value each: the score.

        A sequence predicts from its last token on, so that "completion" is a token nobody reads.
        """
        return [
            Sequence((*prompt, *text, tokenizer.eos_token_id), (tokenizer.eos_token_id,))
            for prompt, text in zip(
                self._prompts([problem for problem, _ in samples], tokenizer),
                _ids([self.text(response) for _, response in samples], tokenizer),
                strict=True,
            )
        ]

    def steps(
        self, samples: Seq[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[Sequence, list[int]]]:
        """The same tokens as sequences of a value for each token, and where each step ends.

        A step is a line of the text with more in it than white space and a tag, and ends with its
        newline; the last step ends with the end-of-sequence token, so that its value is the score.

        Returns:
            Per sample the sequence and the steps' places among its completion tokens: the value
            there has read the step.
        """
        texts = [self.text(response) for _, response in samples]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        eos = tokenizer.eos_token_id
        return [
            (
                Sequence(prompt, (*ids, eos, eos)),
                [*_covering(_newlines(text)[:-1], spans), len(ids) + 1],
            )
            for prompt, text, ids, spans in zip(
                self._prompts([problem for problem, _ in samples], tokenizer),
                texts,
                encoded["input_ids"],
                encoded["offset_mapping"],
                strict=True,
            )
        ]

    def _prompts(self, problems: list[str], tokenizer) -> list[tuple[int, ...]]:
        texts = [render(self.template, problem, tokenizer) for problem in problems]
        # A chat template writes its own begin-of-sequence token.
        return _ids(texts, tokenizer, add_special_tokens=self.template != "chat")


def _ids(texts: list[str], tokenizer, *, add_special_tokens: bool = False) -> list[tuple[int, ...]]:
    if not texts:
        return []
    return list(map(tuple, tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]))


def _newlines(text: str) -> list[int]:
    """Where the newlines lie that end a step; behind the text for a last line without one."""
    ends, at = [], -1
    for line in text.split("\n"):
        at += len(line) + 1
        if line.strip() not in ("", *TAGS):
            ends.append(at)
    return ends


def _covering(characters: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Places, counted from 1, of the last tokens that begin at these characters or before them.

    Both ascend.  A tokenizer may have no token for a newline, or one for it and more.
    """
    found, token = [], 0
    for character in characters:
        while token + 1 < len(spans) and spans[token + 1][0] <= character:
            token += 1
        found.append(token + 1)
    return found


@dataclass(frozen=True)
class Preference:
    """Two responses to one problem, each a sequence of one value (`Reading.sequences`)."""

    problem: str
    chosen: Sequence
    rejected: Sequence

    def __len__(self) -> int:
        """Rows that it takes in a packed batch."""
        return len(self.chosen) + len(self.rejected)


def hold_out(
    pairs: list[Preference], share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Pairs to train on, and those of a random `share` of the problems to evaluate on.

    By problem, as pairs of one problem often have a response in common.  A share that is not 0
    holds out one problem at least.

    Raises:
        UserError: no problem is left to train on.
    """
    if not share:
        return pairs, []
    problems = sorted({pair.problem for pair in pairs})
    count = max(1, round(share * len(problems)))
    if count == len(problems):
        raise UserError(
            f"data.held_out={share} of {len(problems)} problems leaves none to train on: lower it"
        )
    held = set(random.Random(f"{seed}:held out").sample(problems, count))
    return (
        [pair for pair in pairs if pair.problem not in held],
        [pair for pair in pairs if pair.problem in held],
    )
