"""Which language each word of a text is in, among languages of one script, by word frequencies.

A hidden Markov model: the states are the languages and "none of them", a word is emitted with its
frequency in the language's list, and changing the language costs a constant. So a name, a loanword
or a word of several languages goes with its neighbours, and a switch of a few words is seen.

The lists are wordfreq's small ones (words of a frequency of at least 1e-6; code Apache-2.0, data
CC BY-SA 4.0). Word lists rather than a detector's letter sequences: a detector needs a sentence or
so to be right, and says nothing of the words in it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from r1kern.errors import UserError

NONE = -1
_MAX_LETTERS = 40  # a longer word is in no list
# Base-10 logarithms of frequencies.
_UNLISTED = -6.5
_ALIEN = -5.4  # of every word, in the state "none of them": four unlisted words in a row are alien
_SWITCH = -2.5
_PREFER = 1.0  # for a text to begin in the asked language, and to end in it
_TIE = 0.02  # for each word to be in it


def languages_of(words: Sequence[str], languages: tuple[str, ...], target: str) -> np.ndarray:
    """The language of each word, as an index of `languages`, or `NONE`: int64 [W].

    Args:
        words: in the order of the text.
        languages: codes that wordfreq has lists of; they share a script.
        target: the one of them that a word of several goes to.

    Raises:
        UserError: wordfreq is not installed.
    """
    rows, frequencies = _table(languages)
    known = frequencies[[_row(word, rows) for word in words]].astype(np.float32) / 100
    known[:, languages.index(target)] += _TIE
    return _decode(known, languages.index(target))


def _decode(emitted: np.ndarray, target: int) -> np.ndarray:
    """Viterbi's path; emitted float32 [W, K + 1], the last state being "none of them"."""
    count, states = emitted.shape
    score = np.zeros(states, np.float32)
    score[target] = _PREFER
    best = np.empty(count, np.int64)  # the state left where this word begins a new stretch
    stays = np.empty((count, states), bool)
    for i in range(count):
        best[i] = score.argmax()
        switched = score[best[i]] + _SWITCH
        np.greater_equal(score, switched, out=stays[i])
        np.maximum(score, switched, out=score)
        score += emitted[i]
    score[target] += _PREFER
    path = np.empty(count, np.int64)
    state = int(score.argmax()) if count else 0
    for i in range(count - 1, -1, -1):
        path[i] = state
        if not stays[i, state]:
            state = int(best[i])
    path[path == states - 1] = NONE
    return path


def _row(word: str, rows: dict[str, int]) -> int:
    if len(word) > _MAX_LETTERS:
        return 0
    word = word.lower().replace("\u2019", "'")
    row = rows.get(word, 0)
    if not row and "'" in word:  # l'homme, dell'angolo: the lists know the longer part
        row = rows.get(max(word.split("'"), key=len), 0)
    return row


@functools.cache
def _table(languages: tuple[str, ...]) -> tuple[dict[str, int], np.ndarray]:
    """Row of each word, and int16 [rows, K + 1] of 100 log10(frequency); row 0 is unlisted."""
    try:
        from wordfreq import get_frequency_list
    except ImportError as error:
        raise UserError(f"{error}: install it with `pip install wordfreq`") from None
    rows: dict[str, int] = {}
    entries: list[tuple[list[int], int, int]] = []
    for column, language in enumerate(languages):
        for centibels, words in enumerate(get_frequency_list(language, "small")):
            where = [rows.setdefault(word, len(rows) + 1) for word in words]
            entries.append((where, column, -centibels))
    frequencies = np.full((len(rows) + 1, len(languages) + 1), round(100 * _UNLISTED), np.int16)
    frequencies[:, -1] = round(100 * _ALIEN)
    for where, column, value in entries:
        frequencies[where, column] = value
    return rows, frequencies
