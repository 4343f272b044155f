"""The process that runs math-verify for `r1kern.rewards.math`; started by path, never imported.

Requests and replies are JSON lines on stdin and stdout. A request that takes more processor time
than it may ends the process, also when the parent is gone; so does the end of input.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys

DELIMITED = re.compile(r"\$[^$]+\$|\\\(|\\\[|\\boxed")
COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
WORD = re.compile(r"[A-Za-z]{2,}")
NUMBER = re.compile(r"(?<![\w.,])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w|[.,]\d)")
SPACED = re.compile(r"-?\d+(?:\s+\d+)+")
THOUSANDS = re.compile(r"-?\d{1,3}(?: \d{3})+")
MAX_DELIMITED_CHARS = 200  # a longer text without delimiters is no single expression
FUNCTION = re.compile(r"\b(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|sqrt|pi|inf)\b", re.I)
OPERATOR = re.compile(r"[+*/^=<>_]")


def reading(answer: str, running_text: bool) -> str:
    """The text to hand to math-verify's extraction so that the whole answer is judged.

    Left to itself math-verify takes the last number of an undelimited text: 3 for `3\\sqrt{2}`
    and 6 for `5 or 6`. So an answer is delimited as LaTeX, except a number among words
    (`72 clips`), which is that number, and running text, which is left to math-verify.
    """
    if DELIMITED.search(answer):
        return answer
    answer = answer.replace("$", "").strip().rstrip(".").replace("**", "^")
    if SPACED.fullmatch(answer):  # math-verify adds `1 2` up to 3
        return answer.replace(" ", "") if THOUSANDS.fullmatch(answer) else ""
    words = WORD.findall(COMMAND.sub(" ", answer))
    numbers = NUMBER.findall(answer)
    is_formula = "\\" in answer or OPERATOR.search(answer) or FUNCTION.search(answer)
    if words and len(numbers) == 1 and not is_formula:
        return numbers[0]
    if running_text and (len(words) > 1 or len(answer) > MAX_DELIMITED_CHARS):
        return answer
    return "$" + re.sub(r"(?<!\\)%", r"\\%", answer) + "$"


def main() -> None:
    memory_bytes = int(sys.argv[1]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    try:
        from math_verify import parse, verify
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return

    def judge(prediction: str, running_text: bool, gold: str) -> bool:
        # math-verify's own time limits are off: they cannot interrupt a long C call.
        golds = parse(reading(gold, False), parsing_timeout=None)
        found = parse(reading(prediction, running_text), parsing_timeout=None)
        return bool(verify(golds, found, timeout_seconds=None))

    judge("$\\frac{1}{2}$", False, "$0.5$")  # builds the parser's tables before the first request
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # SIGPROF's default action ends the process, inside a long C call too.
        signal.setitimer(signal.ITIMER_PROF, request["deadline_s"])
        correct = judge(request["prediction"], request["running_text"], request["gold"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"correct": correct}), flush=True)


if __name__ == "__main__":
    main()
