"""The language-consistency reward of DeepSeek-R1 (arXiv 2501.12948, section 2.3.2).

"The proportion of target language words in the CoT". The paper does not say how words are told
apart; here, by script, and within a script that several languages share by word lists
(`r1kern.rewards.word_lists`).
"""

from __future__ import annotations

from typing import NamedTuple

import regex

from r1kern.errors import UserError
from r1kern.rewards import word_lists
from r1kern.rewards.format import parts
from r1kern.rewards.prose import prose

# Languages by script. Those that only a word list tells apart stand together; a language that is
# missing is taken for its nearest kin here (Norwegian for Danish) or for none.
SCRIPTS = {
    "Latin": (
        *("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da"),
        *("fi", "pl", "cs", "hu", "ro", "tr", "vi", "id"),
    ),
    "Cyrillic": ("ru", "uk", "bg"),
    "Arabic": ("ar", "fa", "ur"),
    "Hebrew": ("he",),
    "Greek": ("el",),
    "Devanagari": ("hi",),
    "Bengali": ("bn",),
    "Tamil": ("ta",),
    "Thai": ("th",),
    "Hangul": ("ko",),
    "Han": ("zh", "ja"),  # with kana
}
LANGUAGES = tuple(sorted(code for codes in SCRIPTS.values() for code in codes))
_SCRIPT_OF = {code: script for script, codes in SCRIPTS.items() for code in codes}

# Scripts without spaces: characters that make about one word of another language.
_CHARACTERS_A_WORD = {"Han": 2, "Thai": 4}
_ALPHABETS = ("Latin", "Cyrillic", "Greek")  # a single letter of them is a variable
_NOT_WORDS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "log", "ln", "lg", "exp"}
    | {"max", "min", "sup", "inf", "lim", "mod", "gcd", "lcm", "det", "deg", "dim", "arg", "sgn"}
    | {"mm", "cm", "dm", "km", "nm", "mg", "kg", "ml", "kb", "mb", "gb", "ms", "hz", "kw", "mph"}
)

_KANA = r"\p{Hiragana}\p{Katakana}ー"
_WORD = regex.compile(
    rf"(?P<Han>[\p{{Han}}{_KANA}]++)"
    r"|(?<![\p{Latin}\p{N}_])(?P<Latin>\p{Latin}(?:[\p{Latin}\p{M}]|['\u2019](?=\p{Latin}))*+)(?![\p{N}_])"
    + "".join(
        rf"|(?P<{script}>\p{{{script}}}[\p{{{script}}}\p{{M}}]*+)"
        for script in SCRIPTS
        if script not in ("Han", "Latin")
    )
    + r"|(?P<Other>[^\P{L}\p{Latin}\p{Han}][^\P{L}\p{Latin}\p{Han}\p{M}]*+)"
)
_KANA_LETTER = regex.compile(rf"[{_KANA}]")
_KANA_SHARE = 0.15  # of a clause's characters; below, Chinese that quotes a kana
_LONG_WITHOUT_KANA = 8  # characters; Japanese does not go on so long in kanji alone


class _Word(NamedTuple):
    text: str
    script: str
    units: float  # how many words it counts for


def consistency(text: str, target: str) -> float:
    """The share of words of `text` that are in the language `target`, in [0, 1].

    A text with a `<think>` block, or that closes one, is judged by the chain of thought in it, any
    other as a whole. Code, formulas, links and tags are left out (`r1kern.rewards.prose`), so are
    numbers, identifiers with digits or underscores, single letters, capitals of up to four letters
    (`AB`, `GCD`) and the names of functions and units; a word that several languages share counts
    for `target` where its neighbours do. Beside words of a target in another script, up to three
    capitalised Latin words in a row are a name and left out.

    Units: two characters of Chinese or Japanese, and four of Thai, count as one word. Kanji are
    Japanese where their clause or, for short ones, the nearest clause has kana.

    A text that has content but no words (formulas alone) is consistent: 1.0. A blank text is not:
    0.0, or an empty chain of thought would be rewarded.

    Args:
        target: a code of `LANGUAGES`; case and a region ("zh-CN", "pt_BR") do not matter.

    Raises:
        UserError: the target is unknown, or wordfreq is not installed.

    Safe from any thread; time is linear in the length.
    """
    target = _known(target)
    if "<think>" in text or "</think>" in text:
        text = parts(text).reasoning
    if not text.strip():
        return 0.0
    words = _without_names(_words(prose(text)), _SCRIPT_OF[target])
    total = sum(word.units for word in words)
    return _of_target(words, target) / total if total else 1.0


def _known(target: str) -> str:
    code = target.strip().lower().replace("_", "-").split("-")[0]
    if code not in _SCRIPT_OF:
        raise UserError(f"unknown language '{target}': name one of {', '.join(LANGUAGES)}")
    return code


def _words(text: str) -> list[_Word]:
    words = []
    for match in _WORD.finditer(text):
        word, script = match[0], match.lastgroup
        if script in _ALPHABETS and _is_symbol(word):
            continue
        words.append(_Word(word, script, len(word) / _CHARACTERS_A_WORD.get(script, len(word))))
    return words


def _is_symbol(word: str) -> bool:
    return len(word) == 1 or (len(word) <= 4 and (word.isupper() or word in _NOT_WORDS))


def _without_names(words: list[_Word], script: str) -> list[_Word]:
    """The words without Latin names, where the target's script is not Latin and occurs."""
    if script == "Latin" or all(word.script != script for word in words):
        return words
    kept: list[_Word] = []
    run: list[_Word] = []
    for word in [*words, _Word("", script, 0.0)]:
        if word.script == "Latin":
            run.append(word)
            continue
        if len(run) > 3 or not all(w.text[0].isupper() for w in run):
            kept += run
        run = []
        kept.append(word)
    return kept


def _of_target(words: list[_Word], target: str) -> float:
    """How many of the words are the target's, in units."""
    script = _SCRIPT_OF[target]
    own = [word for word in words if word.script == script and word.units]
    if script == "Han":
        return sum(
            w.units
            for w, code in zip(own, _chinese_or_japanese(own, target), strict=True)
            if code == target
        )
    languages = SCRIPTS[script]
    if len(languages) == 1:
        return sum(word.units for word in own)
    found = word_lists.languages_of([w.text for w in own], languages, target)
    return float((found == languages.index(target)).sum())


def _chinese_or_japanese(clauses: list[_Word], target: str) -> list[str]:
    """Which of both each clause of Han characters and kana is; a few kanji alone are `target`'s."""
    sure = [_evident(clause.text) for clause in clauses]
    codes: list[str] = []
    few = sum(len(clause.text) for clause in clauses) <= _LONG_WITHOUT_KANA
    last = next(filter(None, sure), target if few else "zh")
    for code in sure:
        last = code or last
        codes.append(last)
    return codes


def _evident(clause: str) -> str | None:
    """The language that the clause's own characters tell; None for a few kanji."""
    kana = len(_KANA_LETTER.findall(clause))
    if kana >= _KANA_SHARE * len(clause):
        return "ja"
    if kana or len(clause) > _LONG_WITHOUT_KANA or not _in_japanese_character_set(clause):
        return "zh"
    return None


def _in_japanese_character_set(clause: str) -> bool:
    try:
        clause.encode("shift_jis")
    except UnicodeEncodeError:
        return False
    return True
