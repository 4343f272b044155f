"""Benchmarks as their publishers write them, to zero-shot prompts that the reward code judges.

The paper evaluates zero-shot (DeepSeek-R1, arXiv 2501.12948, section 3). The instruction for
mathematics is the one its authors recommend with the released models; with the template of
R1-Zero, which asks for an answer block itself, it is left out.
"""

from __future__ import annotations

import json
import logging
import random
import re
import string
from collections.abc import Callable
from typing import NamedTuple

from r1kern.config import Benchmark, Protocol
from r1kern.data.records import Record, read_records
from r1kern.data.template import render
from r1kern.errors import UserError
from r1kern.eval import code_benchmarks
from r1kern.eval.problem import LeftOut, Problem, first
from r1kern.types import Prompt

_log = logging.getLogger(__name__)

MATH = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = (
    "Please reason step by step, and put the letter of the right choice, and nothing else, within "
    "\\boxed{}."
)


class Kind(NamedTuple):
    """How a benchmark's records are read, and where they come from."""

    read: Callable[[Record], Problem]
    origin: str


def load_benchmark(
    name: str, benchmark: Benchmark, protocol: Protocol, tokenizer
) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts in the file's order, and counts of records left out by reason.

    Raises:
        UserError: the file is missing or a record is not of this kind; names the place in the
            file and where the data comes from.
    """
    kind = KINDS[benchmark.kind]
    template = benchmark.template or protocol.template
    problems, left_out = {}, {}
    try:
        records = read_records(benchmark.path, where=benchmark.where)
        for number, record in enumerate(records):
            try:
                if not _in_window(record, benchmark):
                    raise LeftOut("outside of since and until")
                problem = kind.read(record)
            except LeftOut as reason:
                left_out[str(reason)] = left_out.get(str(reason), 0) + 1
                continue
            key = problem.id or f"{benchmark.kind}-{number}"
            if key in problems:
                raise UserError(f"{record.at}: id '{key}' occurs twice: make ids unique")
            problems[key] = problem
    except UserError as error:
        raise UserError(
            f"benchmark '{name}': {error} (kind {benchmark.kind}; data: {kind.origin})"
        ) from error
    for reason, number in left_out.items():
        _log.info("benchmark %s: %d problems left out: %s", name, number, reason)
    if not problems:
        raise UserError(f"benchmark '{name}': no problem of {benchmark.path} is left: {left_out}")
    chosen = list(problems.items())[: benchmark.limit or None]
    return [_prompt(key, p, template, tokenizer) for key, p in chosen], left_out


def _in_window(record: Record, benchmark: Benchmark) -> bool:
    if benchmark.since is None and benchmark.until is None:
        return True
    day = record.text("contest_date")[:10]
    return (benchmark.since or "") <= day <= (benchmark.until or "9")


def _prompt(key: str, problem: Problem, template: str, tokenizer) -> Prompt:
    question = problem.question
    if problem.task == "math" and template != "r1-zero":
        question = f"{question}\n{MATH}"
    text = render(template, question, tokenizer)
    ids = tokenizer(text, add_special_tokens=template != "chat")["input_ids"]
    return Prompt(
        key,
        tuple(ids),
        problem.answer,
        text,
        question=problem.question,
        task=problem.task,
        tests=tuple(json.dumps(test) for test in problem.tests),
    )


# -- mathematics ----------------------------------------------------------------------------


def _math(record: Record) -> Problem:
    question = record.text(first(record, "problem", "question", "Problem"))
    answer = record.scalar(first(record, "answer", "Answer"))
    return Problem(_id(record), question, answer=answer)


def _gsm8k(record: Record) -> Problem:
    question = record.text(first(record, "question", "problem"))
    answer = record.scalar("answer")
    if "####" in answer:
        answer = answer.rpartition("####")[2]
    elif re.search(r"\s", answer.strip()):
        raise UserError(f"{record.at}: field 'answer' has no '#### NUMBER' at its end")
    return Problem(_id(record), question, answer=answer.strip().replace(",", ""))


def _reference(record: Record) -> Problem:
    """SimpleQA, Chinese SimpleQA, FRAMES: a judge that is given the answer grades these."""
    question = record.text(first(record, "problem", "question", "Prompt"))
    answer = record.scalar(first(record, "answer", "Answer"))
    return Problem(_id(record), question, answer=answer, task="reference")


def _id(record: Record) -> str | None:
    for field in ("id", "ID", "unique_id", "task_id", "question_id"):
        if field in record.values:
            return record.scalar(field)
    return None


# -- multiple choice ------------------------------------------------------------------------


def _choice(record: Record) -> Problem:
    """MMLU, MMLU-Redux, MMLU-Pro: a list of choices, the answer's letter or place in it."""
    question = record.text(first(record, "question", "problem"))
    choices = record.items(first(record, "choices", "options"))
    return _lettered(record, question, choices, record.values.get("answer"))


def _ceval(record: Record) -> Problem:
    choices = [record.scalar(letter) for letter in "ABCD"]
    return _lettered(record, record.text("question"), choices, record.text("answer"))


def _gpqa(record: Record) -> Problem:
    """The right answer stands first in the file: shuffled, in the same way every time."""
    question = record.text("Question")
    fields = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    choices = [record.scalar(field).strip() for field in fields]
    order = list(range(4))
    random.Random(question).shuffle(order)
    shuffled = [choices[i] for i in order]
    problem = _lettered(record, question, shuffled, order.index(0))
    return problem._replace(id=str(record.values.get("Record ID") or "") or None)


def _cluewsc(record: Record) -> Problem:
    target = record.values.get("target")
    if not isinstance(target, dict) or not {"span1_text", "span2_text"} <= target.keys():
        raise UserError(f"{record.at}: field 'target' must hold span1_text and span2_text")
    noun, pronoun = target["span1_text"], target["span2_text"]
    question = f"{record.text('text')}\n上文中的“{pronoun}”指的是“{noun}”吗？"  # noqa: RUF001
    label = str(record.values.get("label")).lower()
    if label not in ("true", "false"):
        raise UserError(f"{record.at}: field 'label' must be true or false, not {label}")
    return _lettered(record, question, ["是", "否"], "AB"[label == "false"])


def _lettered(record: Record, question: str, choices: list, answer: object) -> Problem:
    letters = string.ascii_uppercase[: len(choices)]
    letter = answer
    if type(answer) is int and 0 <= answer < len(choices):
        letter = letters[answer]
    if not isinstance(letter, str) or len(letter) != 1 or letter not in letters:
        raise UserError(
            f"{record.at}: field 'answer' must be one of {letters[0]}-{letters[-1]} or a place "
            f"from 0 to {len(choices) - 1}, not {answer!r}"
        )
    lines = [f"{key}. {choice}" for key, choice in zip(letters, choices, strict=True)]
    text = "\n".join([question, *lines, CHOICE])
    return Problem(_id(record), text, answer=letter, task="choice")


KINDS = {
    "math": Kind(_math, "your own: 'problem' and 'answer'"),
    "aime": Kind(_math, "the Hub's HuggingFaceH4/aime_2024 or math-ai/aime25"),
    "amc": Kind(_math, "the Hub's AI-MO/aimo-validation-amc"),
    "cnmo": Kind(_math, "the Hub's opencompass/LiveMathBench"),
    "math500": Kind(_math, "the Hub's HuggingFaceH4/MATH-500"),
    "gsm8k": Kind(_gsm8k, "github.com/openai/grade-school-math, test.jsonl"),
    "choice": Kind(_choice, "your own: 'question', 'choices' and 'answer'"),
    "mmlu": Kind(_choice, "the Hub's cais/mmlu or edinburgh-dawg/mmlu-redux-2.0"),
    "mmlu_pro": Kind(_choice, "the Hub's TIGER-Lab/MMLU-Pro"),
    "gpqa": Kind(_gpqa, "github.com/idavidrein/gpqa, gpqa_diamond.csv as JSONL"),
    "ceval": Kind(_ceval, "the Hub's ceval/ceval-exam, split val"),
    "cluewsc": Kind(_cluewsc, "github.com/CLUEbenchmark/CLUEWSC2020, dev.json as JSONL"),
    "reference": Kind(
        _reference, "SimpleQA, Chinese SimpleQA or FRAMES: 'question' and 'answer' as JSONL"
    ),
    "humaneval": Kind(
        code_benchmarks.humaneval, "github.com/openai/human-eval, HumanEval.jsonl.gz unpacked"
    ),
    "mbpp": Kind(
        code_benchmarks.mbpp, "github.com/google-research/google-research, mbpp/mbpp.jsonl"
    ),
    "livecodebench": Kind(
        code_benchmarks.livecodebench, "the Hub's livecodebench/code_generation_lite, test*.jsonl"
    ),
    "codeforces": Kind(code_benchmarks.codeforces, "the Hub's open-r1/codeforces, split test"),
}
