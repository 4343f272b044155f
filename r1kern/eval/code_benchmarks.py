"""Programming benchmarks: HumanEval, MBPP, LiveCodeBench, Codeforces.

Each asks for a whole Python program in one fenced block and gives tests in the shapes of
`rewards.code.run_tests`.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib

from r1kern.data.records import Record
from r1kern.errors import UserError
from r1kern.eval.problem import LeftOut, Problem, first

FENCED = (
    "Give the whole program, imports included, in one block that starts with ```python and ends "
    "with ```."
)
STDIN = (
    "Write a Python program that reads the input from standard input and writes the answer to "
    "standard output."
)
MAX_TESTS_BYTES = 1 << 30  # of one problem, unpacked


def humaneval(record: Record) -> Problem:
    """A function to complete (arXiv 2107.03374): `prompt`, `test`, `entry_point`.

    Tests may call helpers that the prompt defines before the function asked for: they are given
    to the test too.
    """
    prompt = record.text(first(record, "prompt", "problem"))
    name = record.text("entry_point")
    helpers = prompt.partition(f"def {name}(")[0]
    question = f"Complete the following Python function.\n```python\n{prompt.rstrip()}\n```\n"
    tests = ({"test": f"{helpers}\n{record.text('test')}", "entry_point": name},)
    return _program(record.scalar(first(record, "task_id", "id")), question + FENCED, tests)


def mbpp(record: Record) -> Problem:
    """A task in one sentence with assertions (arXiv 2108.07732), which the prompt shows.

    Both files are read: mbpp.jsonl (`text`, `test_setup_code`) and the sanitised one (`prompt`,
    `test_imports`).
    """
    asserts = [str(test) for test in record.items(first(record, "test_list", "tests"))]
    setup = record.values.get(first(record, "test_setup_code", "test_setup")) or ""
    setup = "\n".join([*(record.values.get("test_imports") or []), *setup.splitlines()]).strip()
    question = "\n".join(
        [
            record.text(first(record, "text", "prompt", "problem")).strip(),
            "Your code must pass these tests:",
            "```python",
            *([setup] if setup else []),
            *asserts,
            "```",
            FENCED,
        ]
    )
    tests = tuple({"test": test, "setup": setup} if setup else test for test in asserts)
    return _program(record.scalar(first(record, "task_id", "id")), question, tests)


def livecodebench(record: Record) -> Problem:
    """Contest problems with public and private tests (arXiv 2403.07974).

    `code_generation` and `code_generation_lite`: tests are JSON, or JSON that was pickled,
    compressed and written in base64.
    """
    starter = record.values.get("starter_code") or ""
    question = record.text("question_content").strip()
    if starter.strip():
        question += f"\nComplete this code:\n```python\n{starter.rstrip()}\n```\n{FENCED}"
    else:
        question += f"\n{STDIN} {FENCED}"
    function = _function_name(record, starter)
    tests = [
        _lcb_test(record, test, function)
        for field in ("public_test_cases", "private_test_cases")
        for test in _lcb_tests(record, field)
    ]
    return _program(record.scalar("question_id"), question, tuple(tests))


def codeforces(record: Record) -> Problem:
    """Problems in the fields of open-r1/codeforces, named CONTEST + INDEX ("2024A").

    Left out are those that only a checker or an interactor can judge and those without tests.
    """
    values = record.values
    if values.get("interaction_format"):
        raise LeftOut("interactive")
    if values.get("generated_checker"):
        raise LeftOut("several right outputs: needs a checker")
    if values.get("input_mode") not in (None, "stdio"):
        raise LeftOut("reads and writes files")
    examples = values.get("examples") or []
    tests = [*examples, *(values.get("official_tests") or [])]
    if not values.get("official_tests"):
        raise LeftOut("without official tests")
    for test in tests:
        if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
            raise UserError(f"{record.at}: each test must hold 'input' and 'output'")
    parts = [f"# {values['title']}"] if values.get("title") else []
    parts.append(record.text("description").strip())
    for title, field in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        if values.get(field):
            parts.append(f"## {title}\n{values[field].strip()}")
    for test in examples:
        parts.append(f"## Example\nInput:\n{test['input']}\nOutput:\n{test['output']}")
    if values.get("time_limit") and values.get("memory_limit"):
        parts.append(f"Limits: {values['time_limit']} s, {values['memory_limit']} MB.")
    question = "\n\n".join([*parts, f"{STDIN} {FENCED}"])
    name = f"{record.scalar('contest_id')}{record.scalar('index')}"
    kept = tuple({"input": test["input"], "output": test["output"]} for test in tests)
    return _program(name, question, kept)


def _program(name: str, question: str, tests: tuple) -> Problem:
    return Problem(name, question, task="code", tests=tests)


def _function_name(record: Record, starter: str) -> str | None:
    """Of the function that functional tests call; LeetCode's is a method of `Solution`."""
    metadata = record.values.get("metadata") or "{}"
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    except json.JSONDecodeError as error:
        raise UserError(f"{record.at}: field 'metadata' is not JSON ({error})") from error
    if metadata.get("func_name"):
        return metadata["func_name"]
    found = re.search(r"def (\w+)\(self", starter)
    return found[1] if found else None


def _lcb_tests(record: Record, field: str) -> list:
    packed = record.text(field)
    try:
        text = packed if packed.lstrip().startswith("[") else unpack_text(packed)
        tests = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{record.at}: field '{field}' is neither JSON nor packed JSON ({error})"
        ) from error
    if not isinstance(tests, list):
        raise UserError(f"{record.at}: field '{field}' must be a list of tests")
    return tests


def _lcb_test(record: Record, test: dict, function: str | None) -> dict:
    if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
        raise UserError(f"{record.at}: each test must hold 'input' and 'output'")
    if test.get("testtype") != "functional":
        return {"input": test["input"], "output": test["output"]}
    if function is None:
        raise UserError(f"{record.at}: functional tests, but metadata names no func_name")
    try:
        arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
        return {"fn_name": function, "args": arguments, "expected": json.loads(test["output"])}
    except json.JSONDecodeError as error:
        raise UserError(f"{record.at}: a functional test is not JSON ({error})") from error


class _TextUnpickler(pickle.Unpickler):
    """Unpickles built-in values only: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}: it is not only text")


def unpack_text(packed: str) -> str:
    """Text that was pickled, compressed with zlib and written in base64; runs no code.

    Raises:
        ValueError: it is something else, or over 1 GiB unpacked.
    """
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_TESTS_BYTES)
    except zlib.error as error:
        raise ValueError(f"not compressed with zlib: {error}") from error
    if unpacker.unconsumed_tail:
        raise ValueError("over 1 GiB unpacked")
    try:
        text = _TextUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise ValueError(f"not a pickled text: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"holds a {type(text).__name__}, not text")
    return text
