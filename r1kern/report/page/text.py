"""Text of strangers made safe to show, and numbers made short."""

from __future__ import annotations

import html
import math
import unicodedata

NONE = "\u2013"  # in a table, where there is no value

# Cc: control, Cf: format (bidi overrides, zero width), Cs: lone surrogates.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
KEPT = "\n\t\u200c\u200d"  # the joiners shape Persian, Indic scripts and emoji


def visible(text: str) -> str:
    """`text` without characters that act unseen: C0 as control pictures, others as U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(c) for c in text.replace("\r\n", "\n"))


def _visible(c: str) -> str:
    if c in KEPT or unicodedata.category(c) not in HIDDEN:
        return c
    return chr(0x2400 + ord(c)) if ord(c) < 0x20 else "\ufffd"


def safe(text: object) -> str:
    """As HTML text or a quoted attribute's value: it cannot end either."""
    return html.escape(visible(str(text)), quote=True)


def clip(text: str, limit: int) -> tuple[str, int]:
    """The head of `text`, and how many characters were left out."""
    return (text, 0) if len(text) <= limit else (text[:limit], len(text) - limit)


def brief(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def short(value: float, *, percent: bool = False) -> str:
    """About four significant digits; `percent` of a share."""
    if percent:
        return f"{100 * value:.1f} %"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.2e}"
    if size >= 1e4:
        return f"{value:,.0f}".replace(",", "\u202f")
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Of a person's reading: 12.3 s, 4:05 min, 3:07 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{s:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def plural(count: int, noun: str) -> str:
    return f"{short(count)} {noun}{'' if count == 1 else 's'}"


def digits(step: float) -> int:
    """Decimals that tell multiples of `step` apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))
