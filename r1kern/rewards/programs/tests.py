"""Reads the tests of a program in every form that public data sets use.

| form | example | seen in |
|---|---|---|
| input and output | `{"input": "1 2\\n", "output": "3\\n"}`, `("1 2", "3")` | Codeforces, TACO |
| lists of them | `{"inputs": [...], "outputs": [...], "fn_name": ...}` | APPS |
| typed | `{"input": ..., "output": ..., "testtype": "functional"}` | LiveCodeBench |
| a call | `{"fn": "add", "args": [1, 2], "expected": 3}` | LeetCode |
| an assertion | `"assert add(1, 2) == 3"` | MBPP |
| a test program | `{"test": "def check(candidate): ...", "entry_point": "add"}` | HumanEval |
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
from dataclasses import dataclass

from r1kern.errors import UserError
from r1kern.rewards.programs import _code_wire as wire

NAME_KEYS = ("fn", "fn_name", "func_name", "function", "func", "entry_point")
ARGUMENT_KEYS = ("args", "inputs", "input", "stdin")
EXPECTED_KEYS = ("expected", "expected_output", "output", "stdout", "outputs")
CODE_KEYS = ("test", "test_code", "code", "assert", "assertion")
SETUP_KEYS = ("setup", "test_setup", "test_setup_code")
TYPE_KEYS = ("type", "testtype", "test_type")
STDIN_TYPES = ("stdin", "stdin_stdout", "stdio", "standard_input")
CALL_TYPES = ("functional", "function", "function_call", "fn_call", "call", "call_based")

# Names that a test may use without importing them, where its own calls are of other names: were
# they taken from the program, it could decide `assert isclose(f(1), 2.5)`.
COMMON = {
    "math": "isclose isnan isinf isfinite sqrt floor ceil fabs pi e inf nan log prod",
    "collections": "Counter deque defaultdict OrderedDict namedtuple",
    "itertools": "chain permutations combinations product",
    "functools": "reduce",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "copy": "deepcopy",
    "typing": "List Dict Set Tuple Optional Any Union",
}
HOME = {name: module for module, names in COMMON.items() for name in names.split()}


@dataclass(frozen=True)
class Stdin:
    """Standard input and the output it should give.

    Attributes:
        tolerance: numbers may differ by so much, absolutely or relatively; 0: not at all.
    """

    stdin: str
    expected: str
    tolerance: float = 0.0


def read_tests(tests: list, entry_point: str | None = None) -> list[Stdin | dict]:
    """Each test as `Stdin` or as what the checker's process takes (plain JSON).

    Raises:
        UserError: a test that cannot be understood, by its number.
    """
    if isinstance(tests, (str, dict)):
        tests = [tests]
    read = []
    for number, test in enumerate(tests, 1):
        try:
            read += [_read(part, entry_point) for part in _parts(test)]
        # A field of the wrong type shows wherever it is first used.
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(f"test {number} cannot be read ({text}): see rewards.code") from None
    return read


def _parts(test) -> list:
    """The tests of one record: several where it holds lists of them."""
    if not isinstance(test, dict):
        return [test]
    common = {key: value for key, value in test.items() if key not in ("inputs", "outputs")}
    if "test_list" in test:
        setup = "\n".join([*test.get("test_imports", ()), _first(test, SETUP_KEYS) or ""])
        return [{"test": code, "setup": setup} for code in test["test_list"]]
    inputs, outputs = test.get("inputs"), test.get("outputs")
    if isinstance(inputs, list) and isinstance(outputs, list):
        if len(inputs) != len(outputs):
            raise UserError(f"{len(inputs)} inputs but {len(outputs)} outputs")
        if _first(test, NAME_KEYS) is not None:  # APPS wraps what a function returns in a list
            outputs = [
                out[0] if isinstance(out, list) and len(out) == 1 else out for out in outputs
            ]
            pairs = zip(inputs, outputs, strict=True)
            return [{**common, "args": given, "expected": out} for given, out in pairs]
        pairs = zip(inputs, outputs, strict=True)
        return [{**common, "input": given, "output": out} for given, out in pairs]
    return [test]


def _read(test, entry_point: str | None) -> Stdin | dict:
    if isinstance(test, str):
        return _code(test, "", "", None)
    if isinstance(test, (tuple, list)) and len(test) == 2:
        given, expected = test
        if isinstance(given, str) and isinstance(expected, str):
            return Stdin(given, expected)
        args = list(given) if isinstance(given, (tuple, list)) else [given]
        return _call(entry_point, args, {}, expected, 0.0)
    if not isinstance(test, dict):
        raise UserError(f"a {type(test).__name__} is no test")
    kind = _first(test, TYPE_KEYS)
    if kind not in (None, *STDIN_TYPES, *CALL_TYPES):
        raise UserError(f"unknown type {kind!r}: give one of {', '.join(STDIN_TYPES + CALL_TYPES)}")
    name = _first(test, NAME_KEYS) or _first(_metadata(test), NAME_KEYS)
    code = _first(test, CODE_KEYS)
    if isinstance(code, str) and _first(test, EXPECTED_KEYS) is None:
        setup = _first(test, SETUP_KEYS) or ""
        return _code(code, setup, test.get("prompt") or "", name)
    expected = _required(test, EXPECTED_KEYS)
    tolerance = float(test.get("tolerance") or 0.0)
    given = _first(test, ARGUMENT_KEYS)
    texts = all(_is_text(value) for value in ("" if given is None else given, expected))
    if kind in STDIN_TYPES or (kind is None and name is None and texts and "args" not in test):
        return Stdin(_joined(given), _joined(expected), tolerance)
    if kind == "functional" and isinstance(given, str):  # LiveCodeBench: a JSON value a line
        given = [json.loads(line) for line in given.splitlines() if line.strip()]
        expected = json.loads(expected) if isinstance(expected, str) else expected
    if given is None:
        given = []
    args = list(given) if isinstance(given, (tuple, list)) else [given]
    return _call(name or entry_point, args, test.get("kwargs") or {}, expected, tolerance)


def _first(test: dict, keys: tuple[str, ...]):
    return next((test[key] for key in keys if test.get(key) is not None), None)


def _required(test: dict, keys: tuple[str, ...]):
    present = [key for key in keys if key in test]
    if not present:
        raise UserError(f"it has none of the fields {', '.join(keys)}")
    return test[present[0]]


def _metadata(test: dict) -> dict:
    data = test.get("metadata") or {}
    data = json.loads(data) if isinstance(data, str) else data
    if not isinstance(data, dict):
        raise UserError("its metadata is no object")
    return data


def _is_text(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(line, str) for line in value)
    )


def _joined(value) -> str:
    if value is None:
        return ""
    if not _is_text(value):
        raise UserError(f"standard input and output are text, not {type(value).__name__}")
    return value if isinstance(value, str) else "\n".join(value)


def _call(name, args: list, kwargs: dict, expected, tolerance: float) -> dict:
    if name is not None and not isinstance(name, str):
        raise UserError(f"the function's name is {name!r}")
    name = name.rpartition(".")[2] if name else None  # Solution().add, Solution.add
    return {
        "kind": "call",
        "function": name,
        "args": [wire.encode(arg, wire.refuse) for arg in args].copy(),
        "kwargs": {str(key): wire.encode(value, wire.refuse) for key, value in kwargs.items()},
        "expected": wire.encode(expected, wire.refuse),
        "tolerance": tolerance,
    }


def _code(code: str, setup: str, prompt: str, entry: str | None) -> dict:
    """A test program with what the checker needs to know of its names."""
    code = "\n".join(part.replace("\r\n", "\n") for part in (setup, code) if part)
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, MemoryError) as error:
        raise UserError(f"its code does not parse: {error}") from None
    prompt = prompt if _parses(prompt) else ""
    bound = _bound(tree) | (_bound(ast.parse(prompt)) if prompt else set())
    free = {name for name in _loaded(tree) if name not in bound}
    defines = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    checks = "check" in defines and not _calls(tree.body, "check")
    if checks and not entry:
        raise UserError("it defines check(candidate) but names no entry_point")
    if not checks and "candidate" not in free:
        entry = None  # the code says itself what it calls
    free -= {"candidate"} if entry else set()
    remote, imports = _whose(free, tree, entry)
    if entry:
        roots = _loaded(ast.parse(entry, mode="eval"))
        remote = sorted({*remote, *roots})
    if not remote:
        raise UserError("it calls no function of the program")
    tests = [name for name in defines if name.startswith("test")]
    functions = [name for name in tests if not _calls(tree.body, name)]
    return {"kind": "code", "code": code, "prompt": prompt, "entry": entry, "checks": checks,
            "remote": remote, "imports": imports, "functions": functions}  # fmt: skip


def _whose(free: set[str], tree: ast.AST, entry: str | None) -> tuple[list[str], dict[str, str]]:
    """Which free names are the program's, and from which module the others come."""
    modules = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    imports = {name: name for name in free & modules if name in sys.stdlib_module_names}
    known = {name for name in free if hasattr(builtins, name) or name in HOME}
    remote = free - known - imports.keys()
    if not remote and entry is None:  # a function called like a builtin: sum(10, 15) == 6
        remote = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and not any(isinstance(inner, ast.Call) for arg in node.args for inner in ast.walk(arg))
        } & free
    imports |= {name: HOME[name] for name in known - remote if name in HOME}
    return sorted(remote), imports


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def _loaded(tree: ast.AST) -> set[str]:
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
    """Every name that the code itself gives a value anywhere."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return bound


def _calls(body: list, name: str) -> bool:
    """Whether top-level statements call `name`."""
    statements = [node for node in body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        for statement in statements
        for node in ast.walk(statement)
    )
