"""Words of reflection in a response: the mark of the paper's "aha moment"."""

from __future__ import annotations

import re

# Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.4 and Table 3 ("Wait, wait. Wait. That's an
# aha moment", "reevaluate"). The paper gives no list; plain "but" and "however" are left out.
PATTERN = re.compile(
    r"\b(?:wait|hold on|hmm+|aha|on second thought|alternatively"
    r"|let(?:'|\u2019)?s? me (?:re-?)?(?:check|verify)"
    r"|re-?(?:evaluat|check|consider|think|examin|verif|do|calculat|comput)(?:e|es|ed|y|ied|ing)?"
    r"|double[- ]check(?:ed|ing)?|(?:check|try|start) (?:it |this |that )?again"
    r"|i made (?:a|an) (?:mistake|error)|that(?:'|\u2019)s (?:not right|wrong))\b"
    r"|等等|等一下|重新(?:检查|考虑|计算|评估|验证|思考)|再(?:检查|想|算)(?:一下|一遍|想)?|不对",
    re.IGNORECASE,
)


def reflections(text: str) -> list[tuple[int, int]]:
    """Where `text` reflects: spans [start, end) in order, which do not overlap."""
    return [match.span() for match in PATTERN.finditer(text)]
