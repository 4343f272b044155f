"""Sampled completions as HTML: inert text, words of reflection marked."""

from __future__ import annotations

from r1kern.report.page.reflection import reflections
from r1kern.report.page.samples import Group, Sample, Samples
from r1kern.report.page.text import brief, clip, plural, safe, short

FOLDED = 600  # characters beyond which a text is folded


def sample_section(found: Samples, *, longest: int) -> str:
    """Every chosen completion, by the file it comes from.

    Args:
        longest: characters shown of a completion.
    """
    blocks = []
    labels = list(found.shown)
    for label, groups in found.shown.items():
        opened = " open" if label in (labels[0], labels[-1]) else ""
        body = "".join(_group(g, longest) for g in groups)
        blocks.append(f"<details{opened}><summary>{safe(label)}</summary>{body}</details>")
    return "".join(blocks)


def _group(group: Group, longest: int) -> str:
    first = group.chosen[0][1]
    question, left = clip(first.question, 600)
    more = f" <small>… {plural(left, 'character')} more</small>" if left else ""
    answer = f'<p>answer <b dir="auto">{safe(brief(first.answer, 300))}</b></p>'
    return (
        f'<div class="group"><h4 dir="auto">{safe(brief(first.problem, 80))} '
        f"<small>{plural(group.size, 'completion')}</small></h4>"
        f'<p class="question" dir="auto">{safe(question)}{more}</p>'
        f"{answer if first.answer else ''}"
        f'<div class="cards">{"".join(_card(k, s, longest) for k, s in group.chosen)}</div></div>'
    )


def _card(kind: str, sample: Sample, longest: int) -> str:
    head, left, tail = _ends(sample.text, longest)
    count = len(reflections(sample.text))
    facts = [f"reward {short(sample.total)}" if sample.total is not None else ""]
    facts += [f"{brief(k, 40)} {short(v)}" for k, v in sample.terms.items()]
    facts += [plural(sample.tokens, "token") if sample.tokens else ""]
    tags = "".join(f"<span>{safe(fact)}</span>" for fact in facts if fact)
    if sample.finish:
        cut = " bad" if sample.finish == "length" else ""
        told = "cut off at the token limit" if cut else f"finish: {brief(sample.finish, 40)}"
        tags += f'<span class="finish{cut}">{safe(told)}</span>'
    if count:
        tags += f'<span class="reflects">{plural(count, "reflection")}</span>'
    failure = f'<p class="bad">{safe(brief(sample.failure, 300))}</p>' if sample.failure else ""
    gap = f'<small class="cut">… {plural(left, "character")} left out …</small>' if left else ""
    folded = " fold" if len(head) > FOLDED or head.count("\n") > 12 else ""
    return (
        f'<article class="sample"><header><b>{safe(kind)}</b>{tags}</header>{failure}'
        f'<div class="text{folded}" dir="auto">{_marked(head)}{gap}{_marked(tail)}</div></article>'
    )


def _ends(text: str, longest: int) -> tuple[str, int, str]:
    """Head, characters left out, and tail, where the answer is."""
    if len(text) <= longest:
        return text or "(empty)", 0, ""
    tail = longest // 3
    return text[: longest - tail], len(text) - longest, text[-tail:]


def _marked(text: str) -> str:
    parts, at = [], 0
    for start, end in reflections(text):
        parts += [safe(text[at:start]), f"<mark>{safe(text[start:end])}</mark>"]
        at = end
    return "".join([*parts, safe(text[at:])])
