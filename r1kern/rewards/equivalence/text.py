"""Notation made uniform: Unicode, LaTeX dressing, words and units around a formula."""

# ruff: noqa: RUF001  look-alikes of ASCII are what this file replaces

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_UNICODE = {
    **dict.fromkeys("−–—‐‑﹣－", "-"),
    **dict.fromkeys("×·⋅∙•✕", "*"),
    "÷": "/", "⁄": "/", "∕": "/", "√": r"\sqrt ", "∛": r"\sqrt[3]", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "⩽": r"\le ", "⩾": r"\ge ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ",
    "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "′": "'", "’": "'", "…": r"\ldots ",
    "“": "", "”": "", "\u200b": "", "\ufeff": "", "，": ",", "：": ":", "（": "(", "）": ")",
    "€": r"\euro ", "£": r"\pound ", "¥": r"\yen ", "￥": r"\yen ",
    "∑": r"\sum ", "∫": r"\int ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "∠": r"\angle ", "≈": r"\approx ",
}  # fmt: skip
for _letter in "αβγδεζηθκλμνρστφχψω":
    _name = unicodedata.name(_letter).rpartition(" ")[2].lower().replace("lamda", "lambda")
    _UNICODE[_letter] = rf"\{_name} "
_TRANSLATION = str.maketrans(_UNICODE)

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^(-?)\\?\$\s*([\d.,]+)$", r"\1\2 dollar"),
        (r"\b(?:square|sq\.?) ([a-z]+)", r"\1^2"),
        (r"\bcubic ([a-z]+)", r"\1^3"),
        (r"(\d) *[xX] *(?=10 *\^)", r"\1*"),
        (r"(\d[\d.]*) (?=[mbt]r?illion\b)", r"\1*"),
        (r"\bmillion\b", "10^6"),
        (r"\bbillion\b", "10^9"),
        (r"\btrillion\b", "10^{12}"),
        (r"\)\^\{?(?:T|\\top|\\intercal|\\mathsf\{?T\}?)\}?$", ")"),
        (r"^\s*(?:=|\\approx)\s*", ""),
        (r"\\\$|\\euro\b|\\pound\b|\\yen\b", " "),
        (r"(\\\\)\[[\d.]+ *[a-z]{2}\]", r"\1"),
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\$", " "),
        (r"\\(?:left|right|middle)\s*(?:\.(?!\d)|(?![A-Za-z]))", ""),
        (r"\\(?:[bB]igg?[lrm]?)(?![A-Za-z])", ""),
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it)(?![A-Za-z])", ""),
        (r"(\d),\\[!, ]\s*(?=\d{3})|(\d)\{,\}(?=\d{3})", r"\1\2"),
        (r"(\d)\\[,;: ](?=\d{3}(?!\d))", r"\1"),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\quad|\\qquad|~|\\hspace\{[^{}]*\}|\\phantom\{[^{}]*\}", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\operatorname\*?\s*\{([^{}]*)\}", r"\\\1 "),
        (r"\\math(?:rm|it|bf|sf|tt|normal)\s*\{\s*([a-z])\s*\}", r"\1"),
        (r"\\(?:mathbf|boldsymbol|vec|mathit|bm|hat|overrightarrow)\s*\{([^{}]*)\}", r"{\1}"),
        (r"(\d*\.\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", r"\1\\repeating{\2}"),
        (r"(\d*\.\d*?)(\d)\2{2,}\s*(?:\\(?:l|c)?dots|\.\.\.)", r"\1\\repeating{\2}"),
        (r"\\(?:text|mbox|hbox|textrm|textit|textbf|mathrm|mathsf|mathtt|textsf|emph|underline)"
         r"\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:cdot|times|ast|cdots\b(?=))(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:leq|leqslant|leqq)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geq|geqslant|geqq)(?![A-Za-z])|>=|=>", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:varnothing|empty)(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:colon)(?![A-Za-z])", ":"),
        (r"\\(?:l|r)brace(?![A-Za-z])", lambda m: r"\{" if m[0][1] == "l" else r"\}"),
        (r"\\(?:l|r)brack(?![A-Za-z])", lambda m: "[" if m[0][1] == "l" else "]"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\backslash(?![A-Za-z])", r"\\setminus"),
        (r"\\%", "%"),
        (r"(?<!\\)\\[&#_]", " "),
        (r"\^\s*\{?\s*\\?(?:circ|degree)\s*\}?(?:\s*C(?![A-Za-z]))?", r"\\degree "),
        (r"\^\s*\{?\s*(?:st|nd|rd|th)\s*\}?(?![A-Za-z])", ""),
        (r"(?<=\d)(?:st|nd|rd|th)\b", ""),
        (r"\*\*", "^"),
        (r"(\d(?:\.\d+)?)\s*[eE]([+-]?\d{1,4})(?![\d.])", r"(\1*10^{\2})"),
        (r"\\ldots|\\dots", r"\\ldots"),
    ]
]  # fmt: skip
_BOLD = re.compile(r"\*\*([^*]+)\*\*|__([^_]+)__|(?<!\*)\*([^*\s][^*]*)\*(?!\*)|`([^`]+)`")
_RUN = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_LOW_RUN = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
_VULGAR = re.compile(r"[¼-¾⅐-⅞↉]")
_SPACES = re.compile(r"\s+")
_SPACED_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")


def normalise(text: str) -> str:
    """The answer in plain LaTeX: no dressing, Unicode or styles; its words bare."""
    text = text.strip()
    bold = _BOLD.fullmatch(text.rstrip("."))
    if bold:
        text = next(group for group in bold.groups() if group is not None)
    text = _RUN.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _LOW_RUN.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = unicodedata.normalize("NFKC", text.translate(_TRANSLATION))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", text).strip()
    text = text.rstrip(" .,;。\\")
    if "," in text:  # ]0, 1[
        text = re.sub(r"^\]", "(", re.sub(r"\[$", ")", text))
    text = _BASE_WORD.sub(lambda m: "_{" + _NUMBER_WORDS[m[1]] + "}", text)
    return text.replace(" ", "") if _SPACED_THOUSANDS.fullmatch(text) else text


def _vulgar_fraction(match: re.Match) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}
_BASE_WORD = re.compile(rf"_\{{ *({'|'.join(_NUMBER_WORDS)}) *\}}")
_ARTICLE = re.compile(r"^(?:(?:it|this|that) is |the |an |a )+")
_PUNCTUATION = re.compile(r"[.,;:!?'\"(){}]+")


_IDLE_SPACE = re.compile(r"(?<!\w) | (?!\w)|(?<!\d) (?=\d)|(?<=\d) (?!\d)")


def same_text(left: str, right: str) -> bool:
    """Whether two normalised answers differ at most in spaces that part no numbers."""
    return left == right or _IDLE_SPACE.sub("", left) == _IDLE_SPACE.sub("", right)


def words(text: str) -> str:
    """A text answer's words: lower case, without articles and punctuation."""
    text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).strip()
    return _ARTICLE.sub("", text)


def number_word(text: str) -> str:
    """`text`, or its digits if it is a number's name."""
    return _NUMBER_WORDS.get(text.lower(), text)


_CHOICE = re.compile(
    r"(?:option|choice|answer)?:? *"
    r"(?:\( ?(?P<a>[A-Ja-j]) ?\)|(?P<b>[A-J])(?=$|[.):] *)[.):]?)(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_CHOICE = re.compile(r"\([A-Ja-j]\)|\b(?:or|and|not)\b|\b[B-HJ]\b")


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer, perhaps followed by the option's text."""
    match = _CHOICE.fullmatch(text.strip(" {}"))
    if not match or _OTHER_CHOICE.search(match["rest"]):
        return None
    letter = match["a"] or match["b"]
    if match["a"] is None and letter.islower():
        return None
    return letter.upper()


# name: (dimension, size in that dimension's base unit)
_UNITS = {
    name: (dimension, float(size))
    for dimension, rows in {
        "length": "mm,millimeter,millimetre:0.001 cm,centimeter,centimetre:0.01 "
        "dm,decimeter:0.1 m,meter,metre:1 km,kilometer,kilometre:1000 "
        "in,inch,inche:0.0254 ft,foot,feet:0.3048 yd,yard:0.9144 mi,mile:1609.344",
        "mass": "mg,milligram:0.001 g,gram:1 kg,kilogram:1000 lb,pound:453.59237 "
        "oz,ounce:28.349523125 ton,tonne:1000000",
        "time": "ms,millisecond:0.001 s,sec,second:1 min,minute:60 h,hr,hour:3600 day:86400 "
        "week:604800 month:2629746 yr,year:31556952",
        "money": "dollar,usd,buck:1 cent:0.01",
        "volume": "ml,mL,milliliter,millilitre:0.001 l,L,liter,litre:1 gallon,gal:3.785411784",
        "angle": "degree,deg:1",
        "radian": "radian,rad:1",
        "temperature": "celsius:1",
        "percent": "%,percent:1",
        "euro": "euro:1",
        "force": "N,newton:1",
        "energy": "J,joule:1 kJ:1000",
        "power": "W,watt:1 kW:1000",
        "speed": "mph:0.44704",
        "unit": "unit:1",
    }.items()
    for row in rows.split()
    for names, _, size in [row.rpartition(":")]
    for name in names.split(",")
}
_NAMES = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_ONE_UNIT = rf"(?<![a-zA-Z])({_NAMES})(?:s|es)?\.?(?: *\^ *\{{?([-\d]+)\}}?)?"
_UNIT_TAIL = re.compile(
    rf"(?P<value>.*?[\d)}}\]a-zA-Z!])(?P<gap> *){_ONE_UNIT}(?: *(?:/|per) *{_ONE_UNIT})?"
    r"(?: squared| old| long| wide| tall| high)?",
    re.DOTALL,
)
_ANGLE_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc")
_DEGREE_TAIL = re.compile(r"(?P<value>.*\S) *(?P<unit>\\degree|%)", re.DOTALL)


def split_unit(text: str) -> tuple[str, tuple[str, float] | None]:
    """(value, (dimension, size)) of a formula followed by a known unit, else (text, None)."""
    text = text.strip()
    if match := not _ANGLE_FUNCTION.search(text) and _DEGREE_TAIL.fullmatch(text):
        return match["value"], _UNITS["%" if match["unit"] == "%" else "degree"]
    match = _UNIT_TAIL.fullmatch(text)
    if not match:
        return text, None
    value, gap, *factors = match.groups()
    glued = not gap and (len(factors[0]) == 1 or value[-1].isalpha())
    if glued or (not gap and re.search(r"\\[A-Za-z]*$", value)):
        return text, None
    dimension, size = _factor(*factors[:2])
    if factors[2]:
        below, below_size = _factor(*factors[2:])
        dimension, size = f"{dimension}/{below}", size / below_size
    return value, (dimension, size)


def _factor(name: str, power: str | None) -> tuple[str, float]:
    dimension, size = _UNITS[name]
    exponent = int(power) if power else 1
    return (dimension, size) if exponent == 1 else (f"{dimension}^{exponent}", size**exponent)
