"""The pipeline demo's texts: what its base model has read, general questions, preferences.

The base model's corpus shows every habit that the recipe has to sort out: sums answered at once or
worked out, carefully or not, in English, in Chinese, in both; with a check of the result, and now
and then a "wait" when the check fails; answers with and without the template's tags. The general
questions and their good and bad answers are in `files/tiny_general.jsonl`, written for this demo.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from r1kern.data.cold_start import worked
from r1kern.data.gsm8k import steps
from r1kern.data.records import Record, read_records
from r1kern.data.template import R1_ZERO_PREFIX, R1_ZERO_SUFFIX

# A token each: the connectives of a working, the frame of a plain question, the chat's turns.
WORDS = (
    *("first ", " then ", " check ", " wait ", "先", "再", "检查", "等等"),
    *("question: ", " answer: ", " explain every step , reflect and check .", "<user>"),
    "<assistant>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# How the corpus shows an example first, and how it asks for detail, reflection and verification.
EXAMPLE = "question: {problem} answer: {completion} "
FEW_SHOT = "{examples}question: {problem} answer: "
DETAILED = "question: {problem} explain every step , reflect and check . answer: "
PHRASINGS = ("{} ?", "please , {}", "tell me : {}")


class Language(NamedTuple):
    """The words of a working."""

    first: str
    then: str
    check: str
    wait: str


ENGLISH = Language("first ", " then ", " check ", " wait ")
CHINESE = Language("先", "再", "检查", "等等")


def chain(problem: str, rng: random.Random, language: str, *, careless: bool, check: bool):
    """A chain of thought and the answer it comes to.

    `first 8+4=12 then 4+2+1=7 check 72-24=48`; where the check of a careless working fails, `wait`
    and the careful one.

    Args:
        problem: one sum or difference of whole numbers.
        language: "en", "zh" or "mixed" (a coin for every word).
    """

    def say(word: str) -> str:
        other = rng.random() < 0.5 if language == "mixed" else language == "zh"
        return getattr(CHINESE if other else ENGLISH, word)

    def work(careless: bool) -> tuple[str, str]:
        lines, answer = worked(problem, careless=careless)
        first, *rest = lines.split(",")
        return say("first") + first + "".join(say("then") + line for line in rest), answer

    text, answer = work(careless)
    if not check:
        return text, answer
    step = steps(problem)[0][0]
    back, start = ("-", step.left) if step.operator == "+" else ("+", step.left)
    redone = int(answer) - step.right if back == "-" else int(answer) + step.right
    text += f"{say('check')}{answer}{back}{step.right}={redone}"
    if redone != start:
        again, answer = work(False)
        text += say("wait") + again
    return text, answer


def base_documents(
    problems: Sequence[str], general: Sequence[Record], *, visits: int, seed: int
) -> Iterator[dict[str, str]]:
    """Records (`id`, `problem`, `completion`) that a base model is made from, prompts rendered."""
    rng = random.Random(seed)
    number = 0
    for _ in range(visits):
        for problem in rng.sample(problems, len(problems)):
            number += 1
            prompt, completion = _document(problem, problems, rng)
            yield {"id": f"sum-{number}", "problem": prompt, "completion": completion}
        for record in rng.sample(general, len(general)):
            number += 1
            question = rng.choice(PHRASINGS).format(record.text("problem"))
            good = rng.random() < 0.5
            answer = record.text("answer") if good else rng.choice(record.items("bad"))
            prompt, completion = f"question: {question} answer: ", answer
            if rng.random() < 0.5:
                prompt = R1_ZERO_PREFIX + question + R1_ZERO_SUFFIX
                completion = tagged(record.values.get("thought", "") if good else "", answer)
            yield {"id": f"talk-{number}", "problem": prompt, "completion": completion}


def _document(problem: str, problems: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """A prompt and its completion in one of the corpus' habits."""
    language = rng.choices(("en", "zh", "mixed"), (0.5, 0.2, 0.3))[0]
    careless, check = rng.random() < 0.3, rng.random() < 0.35
    kind = rng.choices(("template", "direct", "untagged", "shown", "asked"), (40, 25, 5, 15, 15))[0]
    thought, answer = chain(problem, rng, language, careless=careless, check=check)
    if kind == "direct":
        return R1_ZERO_PREFIX + problem + R1_ZERO_SUFFIX, tagged("", str(steps(problem)[0][1]))
    if kind == "untagged":
        return R1_ZERO_PREFIX + problem + R1_ZERO_SUFFIX, f" {thought} answer: {answer}"
    if kind == "template":
        return R1_ZERO_PREFIX + problem + R1_ZERO_SUFFIX, tagged(thought, answer)
    if kind == "asked":
        thought, answer = chain(problem, rng, language, careless=careless, check=True)
        return DETAILED.format(problem=problem), tagged(thought, answer)
    shown = rng.choice(problems)
    example = EXAMPLE.format(
        problem=shown,
        completion=tagged(*chain(shown, rng, language, careless=False, check=check)),
    )
    return FEW_SHOT.format(examples=example, problem=problem), tagged(thought, answer)


def tagged(thought: str, answer: str) -> str:
    """Thought and answer in the template's tags."""
    return f"<think> {thought} </think> <answer> {answer} </answer>".replace("  ", " ")


def examples(problems: Sequence[str], count: int, *, seed: int) -> Iterator[dict[str, str]]:
    """Long chains of thought in English, checked, to show in a few-shot prompt."""
    rng = random.Random(f"{seed}:examples")
    for problem in rng.sample(problems, count):
        thought, answer = chain(problem, rng, "en", careless=False, check=True)
        yield {"id": problem, "problem": problem, "completion": tagged(thought, answer)}


def write_general(folder: Path) -> dict[str, Path]:
    """The general prompts and the preference pairs, as JSON lines in `folder`.

    Every question comes in three phrasings; the last is in no pair and no prompt but
    `general_eval`.

    Returns:
        Paths by name: "general", "general_eval" (prompts), "helpfulness", "harmlessness" (pairs).
    """
    rows = {name: [] for name in ("general", "general_eval", "helpfulness", "harmlessness")}
    for record in read_records("bundled:tiny_general"):
        for place, phrasing in enumerate(PHRASINGS):
            held_out = place == len(PHRASINGS) - 1
            prompt = {
                "id": f"{record.text('id')}-{place}",
                "problem": phrasing.format(record.text("problem")),
                "kind": record.text("kind"),
            }
            answered = {**prompt, "task": "general", "answer": record.text("answer")}
            rows["general_eval" if held_out else "general"].append(answered)
            if not held_out:
                for name, pairs in _pairs(record).items():
                    start = len(rows[name])
                    rows[name] += [
                        {**prompt, "id": f"{name}-{start + i}", "chosen": good, "rejected": bad}
                        for i, (good, bad) in enumerate(pairs)
                    ]
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def _pairs(record: Record) -> dict[str, list[tuple[str, str]]]:
    """(chosen, rejected) responses to a question: one is more helpful, or less harmful."""
    thought, answer = record.values.get("thought", ""), record.text("answer")
    good = tagged(thought, answer)
    pairs = {"helpfulness": [], "harmlessness": []}
    for bad in record.items("bad"):
        pairs["helpfulness"].append((good, tagged(thought, bad)))
        pairs["harmlessness"] += [(good, harm) for harm in _harms(record, thought, answer, bad)]
    return pairs


def _harms(record: Record, thought: str, answer: str, bad: str) -> list[str]:
    """Responses that do harm: in the answer, or in the thought before a good answer."""
    insult = "you fool"
    if record.text("kind") == "unsafe":
        return [tagged(thought, bad), tagged(bad, answer)]
    return [tagged(f"{thought} {insult}".strip(), answer), tagged(thought, f"{answer} {insult}")]
