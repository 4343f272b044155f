"""Penalties for completions that are too long or repeat themselves; neither is the paper's."""

from __future__ import annotations

import regex

_TOKEN = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|\S[^\s\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]*+"
)


def overlong(tokens: int, *, max_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), in [-1, 0].

    0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens`, -1 beyond.

    Args:
        tokens: length of the completion.
        max_tokens: L_max.
        buffer: L_cache, the last stretch before it; 0 punishes only beyond `max_tokens`.
    """
    assert 0 <= buffer <= max_tokens, f"0 <= buffer {buffer} <= max_tokens {max_tokens}"
    free = max_tokens - buffer
    if tokens <= free:
        return 0.0
    return max(-1.0, (free - tokens) / buffer) if buffer else -1.0


def repetition(text: str, *, ngram: int) -> float:
    """Minus the share of n-grams that occurred before: 1 - distinct / all, in [-1, 0].

    Source: Open-R1's repetition penalty with a largest penalty of -1, after "Demystifying Long
    Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373, appendix). Words are lower-cased and
    separated by white space; unlike there, a character of Chinese, Japanese or Thai is a word. A
    text of fewer than `ngram` words repeats nothing: 0. Time is linear in the length.
    """
    assert ngram > 0, f"ngram {ngram} must be positive"
    words = _TOKEN.findall(text.lower())
    count = len(words) - ngram + 1
    if count <= 0:
        return 0.0
    return len(set(zip(*(words[i:] for i in range(ngram)), strict=False))) / count - 1.0
