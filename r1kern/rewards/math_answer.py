"""The final answer within a text: its last `<answer>` block, box, or closing words.

All searches are linear in the text, of whose running words only the end is looked at.
"""

from __future__ import annotations

import re

MAX_TAIL_CHARS = 2_000
MAX_PLAIN_WORDS = 6  # a line with more words is running text, not an answer

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(\{|[^\s{}\\$]+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LISTED_BOXES = re.compile(r"[\s$]*(?:,|;|and|or|, ?and|\\text\{ *(?:and|or) *\})[\s$]*")
_ASSERTION = re.compile(
    r"####"
    r"|\b(?:answers?|option|choice|solutions?)\b[ *_]*(?:(?:is|are)\b|:|=)[\s*_:]*"
    r"(?:(?:therefore|thus|equal to|just|simply)\b\s*)?"
    r"|\banswers?\b[ *_#:]*\n[\s*_]*"
    r"|\u7b54\u6848\s*(?:\u662f|\u4e3a|\uff1a|:)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"\.(?=\s|$|\*)|\n|\u3002|[!?](?=\s|$)(?=\s+[A-Z]|\s*$)|\s(?:because|since)\b"
)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_LISTED = re.compile(r"\s*(?:,|;|and|or|, ?(?:and|or))\s*", re.IGNORECASE)
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm|operatorname)\s*\{[^{}]*\}")
_NUMBER = re.compile(
    r"(?<![\w.,/^*\\({\[])[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?![\w^/*({\[])(?!\.\d)"
)
_HAN = re.compile(r"[\u4e00-\u9fff]")
_HEDGE = re.compile(r"\b(?:or|either|not|maybe|perhaps|possibly|guess)\b", re.IGNORECASE)


def final_answer(text: str) -> str:
    """The answer that `text` ends with, in its own notation; "" where it gives none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        text = text[start + len("<answer>") : end]
    else:
        # A completion that opened the template and was cut off has not answered.
        text = text.rpartition("</think>")[2]
        if "<think>" in text or "<answer>" in text:
            return ""
    boxed = last_boxed(text)
    return _closing_words(text.strip()) if boxed is None else boxed.strip()


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` holds, "" if it is not closed, None where there is no box.

    The boxes of a list (`\boxed{1} and \boxed{2}`) are one answer.
    """
    last = max(text.rfind(box) for box in ("\\boxed", "\\fbox", "\\framebox"))
    if last < 0:
        return None
    text = text[max(0, last - MAX_TAIL_CHARS) : last + MAX_TAIL_CHARS]
    answers: list[str] = []
    at = end = 0
    while box := _BOX.search(text, at):
        inner_end = box.end() if box[1] != "{" else _closing_brace(text, box.end())
        if inner_end is None:
            return ""
        if not (answers and _LISTED_BOXES.fullmatch(text, end, box.start())):
            answers.clear()
        answers.append(text[box.end() : inner_end] if box[1] == "{" else box[1].rstrip(".,;"))
        at = end = inner_end + (box[1] == "{")
    nested = last_boxed(answers[-1]) if answers else ""
    return ", ".join(answers) if nested is None else nested


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def _closing_words(text: str) -> str:
    """The answer of running text: what its last assertion asserts, else its last result."""
    if len(text) > MAX_TAIL_CHARS:
        text = text[-MAX_TAIL_CHARS:]
    text = re.sub(r"I hope it is correct\W*$", "", text).strip()
    assertions = list(_ASSERTION.finditer(text))
    if assertions:
        return _of_sentence(_first_sentence(text[assertions[-1].end() :].strip("\n *_:")))
    if (
        "\n" not in text
        and not _HAN.search(text)
        and len(_WORD.findall(_TEXT.sub("", text))) <= MAX_PLAIN_WORDS
    ):
        return _of_sentence(text)
    for sentence in reversed(_sentences(text)):
        if _MATH.search(sentence):
            return _of_sentence(sentence)
        numbers = list(_NUMBER.finditer(sentence))
        if numbers:
            return "" if _HEDGE.search(sentence) else numbers[-1][0]
    return ""


def _first_sentence(text: str) -> str:
    return next(iter(_sentences(text)), "")


def _sentences(text: str) -> list[str]:
    """The sentences; a full stop or new line inside delimited mathematics ends none."""
    inside = [match.span() for match in _MATH.finditer(text)]
    sentences, start, at = [], 0, 0
    for end in _SENTENCE_END.finditer(text):
        while at < len(inside) and inside[at][1] <= end.start():
            at += 1
        if at < len(inside) and inside[at][0] <= end.start():
            continue
        sentences.append(text[start : end.start()])
        start = end.end()
    sentences.append(text[start:])
    return [sentence for sentence in map(str.strip, sentences) if sentence.strip("*_ ")]


def _of_sentence(sentence: str) -> str:
    """The sentence's mathematics: all of a closing list, else the last piece; else its words."""
    pieces = list(_MATH.finditer(sentence))
    if not pieces:
        return sentence
    outside = _MATH.sub(" ", sentence)
    if len(pieces) == 1 and not _WORD.search(outside):
        return sentence
    answers = [_inner(pieces[-1])]
    for before, after in zip(pieces[-2::-1], pieces[:0:-1], strict=True):
        if not _LISTED.fullmatch(sentence, before.end(), after.start()):
            break
        answers.insert(0, _inner(before))
    hedged = len(answers) == 1 and _HEDGE.search(outside)
    return "" if hedged else ", ".join(answers)


def _inner(piece: re.Match) -> str:
    return next(group for group in piece.groups() if group is not None)
