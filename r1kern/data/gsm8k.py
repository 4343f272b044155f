"""How the bundled arithmetic problems were derived from GSM8K's calculator annotations.

`python -m r1kern.data.gsm8k TRAIN.jsonl TEST.jsonl OUT_DIR` writes
`gsm8k_arith_{train,val,test}.jsonl` from the two files of github.com/openai/grade-school-math
(MIT licence), whose solutions carry annotations such as `<<48/2=24>>`.

A problem is a distinct whole-number expression with the annotation's result: a sum, a difference,
a product with a one-digit factor, or a chain of two such operations. The held-out problems come
from GSM8K's test split; none of them, in whatever order of its operands, occurs in train or
validation, nor does a validation problem in train.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1kern.data.records import read_records

KINDS = {"+": "add", "-": "sub", "*": "mul"}
VALIDATION_SIZE = 300
MAX_VALUE = 9999
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_NUMBER = r"(0|[1-9]\d{0,2})"
_EXPRESSION = re.compile(rf"{_NUMBER}([-+*]){_NUMBER}(?:([-+*]){_NUMBER})?")


@dataclass(frozen=True)
class Step:
    """One operation on whole numbers: `left operator right`."""

    left: int
    operator: str
    right: int

    @property
    def value(self) -> int:
        left, right = self.left, self.right
        return {"+": left + right, "-": left - right, "*": left * right}[self.operator]

    @property
    def is_easy(self) -> bool:
        """Neither negative nor beyond `MAX_VALUE`, and a product only with a one-digit factor."""
        one_digit = self.operator != "*" or min(self.left, self.right) <= 9
        return one_digit and 0 <= self.value <= MAX_VALUE


@dataclass(frozen=True)
class Problem:
    """A record of the bundled files.

    Attributes:
        id: unique name.
        problem: the expression, without spaces.
        answer: its value.
        kind: "add", "sub", "mul" or "chain".
        split: "train", "val" or "test".
    """

    id: str
    problem: str
    answer: str
    kind: str
    split: str


def steps(
    expression: str, evaluate: Callable[[Step], int] = lambda step: step.value
) -> list[tuple[Step, int]]:
    """The operations of an expression with their results, in the order they are done.

    Args:
        evaluate: gives the result of an operation, which the next one goes on from.

    Raises:
        ValueError: it is not one or two of `+ - *` on numbers of up to three digits.
    """
    match = _EXPRESSION.fullmatch(expression)
    if match is None:
        raise ValueError(f"not an expression of one or two operations: {expression!r}")
    a, first, b, second, c = match.groups()
    a, b = int(a), int(b)
    if second == "*" and first != "*":
        inner = Step(b, second, int(c))
        outer = Step(a, first, evaluate(inner))
    else:
        inner = Step(a, first, b)
        if second is None:
            return [(inner, evaluate(inner))]
        outer = Step(evaluate(inner), second, int(c))
    return [(inner, evaluate(inner)), (outer, evaluate(outer))]


def canonical(expression: str) -> tuple:
    """Equal for two expressions that differ only in the order of their terms and factors."""
    terms = re.findall(r"([-+]?)([\d*]+)", expression)
    return tuple(
        sorted((sign or "+", *sorted(map(int, product.split("*")))) for sign, product in terms)
    )


def problems_of(solutions: Iterable[str], split: str) -> list[Problem]:
    """The distinct problems in the annotations of some solutions, in order of appearance."""
    found: dict[str, Problem] = {}
    for solution in solutions:
        for left, right in _ANNOTATION.findall(solution):
            expression = re.sub(r"[\s,]", "", left)
            if _EXPRESSION.fullmatch(expression) is None:
                continue
            done = steps(expression)
            result = str(done[-1][1])
            if result == re.sub(r"[\s,]", "", right) and all(step.is_easy for step, _ in done):
                kind = "chain" if len(done) == 2 else KINDS[done[0][0].operator]
                name = f"gsm8k-{expression}"
                found[expression] = Problem(name, expression, result, kind, split)
    return list(found.values())


def split_problems(train: list[Problem], test: list[Problem]) -> dict[str, list[Problem]]:
    """Train, validation (cut from train by hash) and held-out problems, free of each other."""
    groups: dict[tuple, list[Problem]] = {}
    for problem in train:
        groups.setdefault(canonical(problem.problem), []).append(problem)
    by_hash = sorted(groups, key=lambda key: hashlib.sha256(repr(key).encode()).hexdigest())
    chosen = set(by_hash[:VALIDATION_SIZE])
    held_out = {canonical(p.problem): p for p in reversed(test)}
    return {
        "train": [p for p in train if canonical(p.problem) not in chosen],
        "val": [replace(groups[key][0], split="val") for key in groups if key in chosen],
        "test": [p for key, p in reversed(held_out.items()) if key not in groups],
    }


def main(train_path: str, test_path: str, out_dir: str) -> None:
    found = []
    for path, split in ((train_path, "train"), (test_path, "test")):
        records = read_records(path)
        # The repository's own files call the annotated solution `answer`.
        field = "solution_raw" if "solution_raw" in records[0].values else "answer"
        found.append(problems_of([record.text(field) for record in records], split))
    for split, problems in split_problems(*found).items():
        lines = [json.dumps(asdict(problem)) + "\n" for problem in problems]
        Path(out_dir, f"gsm8k_arith_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(problems)} problems")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m r1kern.data.gsm8k TRAIN.jsonl TEST.jsonl OUT_DIR")
    main(*sys.argv[1:])
