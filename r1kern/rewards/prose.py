"""The running text of a completion: without code, formulas, links and tags."""

from __future__ import annotations

import re

_MATH_ENVIRONMENTS = (
    "align|aligned|alignat|array|bmatrix|Bmatrix|cases|displaymath|eqnarray|equation|gather|"
    "gathered|math|matrix|multline|pmatrix|smallmatrix|split|tabular|vmatrix|Vmatrix"
)
_OPENER = re.compile(
    rf"```|~~~|\$\$|\\\[|\\\(|\\begin\{{(?P<environment>(?:{_MATH_ENVIRONMENTS})\*?)\}}"
)
_CLOSERS = {"```": "```", "~~~": "~~~", "$$": "$$", r"\[": r"\]", r"\(": r"\)"}
_FENCES = ("```", "~~~")
_INLINE = re.compile(
    r"`[^`\n]+`"
    r"|\$(?=\S)[^$\n]+(?<=\S)\$(?!\d)"  # pandoc's rule, by which "$2 and $3" are two prices
    r"|(?:https?://|www\.)[!-~]+"  # ASCII: Chinese text may follow a link without a space
    r"|</?[A-Za-z|][\w|-]{0,30}[ ]?/?>"
    r"|\\[A-Za-z]+"
    r"|(?<![\w.-])[\w.-]{1,64}@[\w.-]{1,64}"
)


def prose(text: str) -> str:
    """`text` without code, mathematics, links, e-mail addresses and tags; a space stands for each.

    Code is what stands between triple or single backticks or `~~~`, an unclosed fence running to
    the end. Mathematics is `$...$` on one line, `$$...$$`, `\\(...\\)`, `\\[...\\]` and the
    mathematical environments of LaTeX; an opening without its end is dropped alone, as is a command
    outside. What `\\text{}` says within a formula goes with it. Time is linear in the length.
    """
    kept, position = [], 0
    never_closed: set[str] = set()  # each closer is sought in vain once, so time stays linear
    for opener in _OPENER.finditer(text):
        if opener.start() < position:
            continue
        environment = opener["environment"]
        closer = f"\\end{{{environment}}}" if environment else _CLOSERS[opener[0]]
        end = -1 if closer in never_closed else text.find(closer, opener.end())
        kept.append(text[position : opener.start()])
        position = opener.end()
        if end >= 0:
            position = end + len(closer)
        elif opener[0] in _FENCES:
            position = len(text)
            break
        else:
            never_closed.add(closer)
    kept.append(text[position:])
    return _INLINE.sub(" ", " ".join(kept))


def has_code_block(text: str) -> bool:
    """Whether `text` holds a fenced block of code."""
    return any(fence in text for fence in _FENCES)
