"""Cold-start data of the demo: worked solutions of arithmetic problems in varied styles.

Every visit of a problem draws its style anew (a small model would memorise fixed ones): answered at
once with an empty think, worked out, or worked out by a careless hand that forgets carries. The
careless ones make wrong answers for reinforcement learning to weed out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from r1kern.data.gsm8k import Step, steps


def write_cold_start(
    problems: Iterable[str],
    path: str | Path,
    *,
    visits: int,
    seed: int,
    direct: float = 0.4,
    careless: float = 0.25,
) -> int:
    """Writes a JSONL file of SFT records (`id`, `problem`, `completion`, `style`).

    Args:
        problems: expressions as in the bundled files.
        visits: records per problem, each visit in a new order.
        seed: of orders and styles; the same seed writes the same file.
        direct: share of records answered at once.
        careless: share of the worked ones that forget carries.

    Returns:
        The number of records.
    """
    rng = random.Random(seed)
    problems = list(problems)
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for visit in range(visits):
            rng.shuffle(problems)
            for pair in cold_start_pairs(problems, rng, direct=direct, careless=careless):
                file.write(json.dumps({"id": f"{visit}-{pair['problem']}", **pair}) + "\n")
                count += 1
    return count


def cold_start_pairs(
    problems: Iterable[str], rng: random.Random, *, direct: float = 0.4, careless: float = 0.25
) -> Iterator[dict[str, str]]:
    """One record (`problem`, `completion`, `style`) per problem, its style drawn from `rng`."""
    for problem in problems:
        if rng.random() < direct:
            style, think, answer = "direct", "", str(steps(problem)[-1][1])
        else:
            style = "careless" if rng.random() < careless else "worked"
            think, answer = worked(problem, careless=style == "careless")
        think = f" {think} " if think else " "
        completion = f"<think>{think}</think> <answer> {answer} </answer>"
        yield {"problem": problem, "completion": completion, "style": style}


def worked(problem: str, *, careless: bool = False) -> tuple[str, str]:
    """The working and the answer: `48+24` gives `8+4=12,4+2+1=7` and `72`.

    One operation is worked digit by digit, from the right, a carry or borrow as the last term; two
    operations one after the other, `12+34-5` as `12+34=46,46-5=41`. A careless hand forgets every
    carry and borrow.
    """
    done = steps(problem, lambda step: _columns(step, careless)[1])
    if len(done) == 1:
        lines = _columns(done[0][0], careless)[0]
    else:
        lines = [f"{step.left}{step.operator}{step.right}={value}" for step, value in done]
    return ",".join(lines), str(done[-1][1])


def _columns(step: Step, careless: bool) -> tuple[list[str], int]:
    """The columns from the right, each `digit operator digit carry = total`, and the result."""
    left, operator, right = step.left, step.operator, step.right
    if operator == "*":
        right, left = sorted((left, right))
        assert right <= 9, "a product needs a one-digit factor"
    width = max(len(str(left)), len(str(right)))
    lines, value, carry = [], 0, 0
    for place in range(width):
        a = left // 10**place % 10
        b = right if operator == "*" else right // 10**place % 10
        carried = 0 if careless else carry
        if operator == "-":
            carry = int(a - b - carried < 0)
            a += 10 * carry
            total = a - b - carried
        else:
            total = (a + b if operator == "+" else a * b) + carried
            carry = total // 10
        sign = "-" if operator == "-" else "+"
        lines.append(f"{a}{operator}{b}" + (f"{sign}{carried}" if carried else "") + f"={total}")
        is_last = place == width - 1
        value += (total if is_last else total % 10) * 10**place
    return lines, value
