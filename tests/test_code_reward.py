"""The code reward: every form of a test, right and wrong programs, and attacks on the sandbox.

Truth: reference solutions of HumanEval and MBPP, and the machine itself (files, processes, a server
that listens). The attacks are in code_attacks.py.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import code_attacks as attacks
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1kern.config import Sandbox
from r1kern.errors import UserError
from r1kern.rewards.code import CodeGrader, program_of, run_tests
from r1kern.rewards.programs import _code_wire as wire
from r1kern.rewards.programs.tests import Stdin, read_tests
from r1kern.rewards.verdict import Verdict

DATA = Path(__file__).parent / "data" / "code_tasks.jsonl"
TASKS = [json.loads(line) for line in DATA.read_text().splitlines()]
ADD = "def add(a, b=0):\n    return a + b\n"
SUM = "print(sum(map(int, input().split())))\n"
PATIENCE = dict(timeout_s=60.0)  # on a busy machine


def together(calls: dict) -> dict:
    """The results of calls made at the same time: (result, seconds)."""

    def timed(call):
        began = time.monotonic()
        return call(), time.monotonic() - began

    with ThreadPoolExecutor(4) as threads:
        return dict(zip(calls, threads.map(timed, calls.values()), strict=True))


# Forms of a test


RIGHT = {
    "pair of texts": (SUM, ("1 2\n", "3\n")),
    "list pair": (SUM, ["1 2", "3"]),
    "input, output": (SUM, {"input": "1 2", "output": "3"}),
    "stdin, stdout": (SUM, {"stdin": "1 2", "stdout": "3\n\n"}),
    "input, expected_output": (SUM, {"input": "1 2", "expected_output": " 3 "}),
    "typed stdin": (SUM, {"type": "stdin_stdout", "input": "1 2", "output": "3"}),
    "LiveCodeBench stdin": (SUM, {"input": "1 2", "output": "3", "testtype": "stdin"}),
    "lines": (SUM, {"input": ["1 2", "9"], "output": ["3"]}),
    "APPS": (SUM, {"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}),
    "APPS function": (ADD, {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], 7]}),
    "tolerance": ("print(1/3)", {"input": "", "output": "0.33333", "tolerance": 1e-4}),
    "LiveCodeBench function": (
        "class Solution:\n    def add(self, a, b): return tuple(a + b)",
        {"input": "[1]\n[2]", "output": "[1, 2]", "testtype": "functional", "fn_name": "add"},
    ),
    "LiveCodeBench metadata": (
        ADD,
        {"input": "1\n2", "output": "3", "testtype": "functional",
         "metadata": '{"func_name": "add"}'},
    ),
    "fn": (ADD, {"fn": "add", "args": [1, 2], "expected": 3}),
    "function, kwargs": (ADD, {"function": "add", "args": [1], "kwargs": {"b": 2}, "output": 3}),
    "entry_point": (ADD, {"entry_point": "add", "inputs": [1, 2], "expected_output": 3}),
    "func, text": ("def up(s): return s.upper()", {"func": "up", "input": "a", "output": "A"}),
    "expected None": ("def f(x): x.append(1)", {"fn": "f", "args": [[]], "expected": None}),
    "pair of values": (ADD, ([1, 2], 3)),
    "assertion": (ADD, "assert add(1, 2) == 3"),
    "assertion with a module": (ADD, "assert math.isclose(add(0.1, 0.2), 0.3)"),
    "MBPP record": (ADD, {"test_list": ["assert add(1, 2) == x"], "test_setup_code": "x = 3"}),
    "HumanEval": (
        ADD, {"test": "def check(candidate):\n    assert candidate(1, 2) == 3",
              "entry_point": "add"}),
    "HumanEval, method": (
        "class Solution:\n    def add(self, a, b): return a + b",
        {"test": "def check(candidate):\n    assert candidate(1, b=2) == 3",
         "entry_point": "Solution().add"}),
    "pytest": (ADD, "def test_it():\n    assert add(1, 2) == 3\ndef test_two():\n    add(1)"),
    "candidate": (ADD, {"test": "assert candidate(1, 2) == 3", "entry_point": "add"}),
    "objects": (
        "class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
        "    def __len__(self): return 2\n    def __eq__(self, o): return self.v == o.v\n"
        "def total(n): return n.v + (total(n.next) if n.next else 0)",
        "a = Node(1)\na.next = Node(2)\nassert total(a) == 3 and a.next.v == 2 and len(a) == 2\n"
        "assert Node(1) == Node(1) and Node(1) != Node(2)"),
    "changes in place": (
        "def f(a, d, s):\n    a[0].append(1)\n    a.sort()\n    d['k'] = 2\n    s.clear()",
        "a, b, d, s = [[3], [2]], None, {}, {1}\nb = a[0]\nf(a, d, s)\n"
        "assert a == [[2], [3, 1]] and d == {'k': 2} and s == set()"),
    "functions as arguments": (
        "def apply(f, xs): return [f(x) for x in xs]",
        "assert apply(lambda x: x + 1, [1, 2]) == [2, 3]\nassert apply(str, [1]) == ['1']\n"
        "assert apply(len, ['ab']) == [2]"),
    "exceptions": (
        "class Mine(KeyError): pass\ndef f(x):\n    raise Mine('no')",
        "try:\n    f(1)\n    assert False, 'none'\nexcept KeyError as error:\n"
        "    assert 'no' in str(error)"),
    "generators": (
        "def f():\n    n = 0\n    while True:\n        n += 1\n        yield n",
        "it = f()\nassert next(it) == 1 and [next(it), next(it)] == [2, 3]\n"
        "assert [x for x, _ in zip(f(), range(3))] == [1, 2, 3]"),
    "generator as a value": ("def f(n): return map(str, range(n))",
                             {"fn": "f", "args": [2], "expected": ["0", "1"]}),
    "a builtin's name": ("def sum(a, b): return a * b", "assert sum(10, 15) == 150"),
    "rich data": (
        "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "P = namedtuple('P', 'x y')\n"
        "def f(): return [{(1, 2): {3}}, P(1, 2), 1j, b'a', float('-inf'), 2 ** 100, range(3), "
        "Counter('aa'), defaultdict(int, a=1), deque([1]), Decimal('1.5'), Fraction(1, 3), None, "
        "True, '\\ud800']",
        "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "assert f() == [{(1, 2): {3}}, (1, 2), 1j, b'a', float('-inf'), 2 ** 100, range(3), "
        "Counter('aa'), {'a': 1}, deque([1]), Decimal('1.5'), Fraction(1, 3), None, True, "
        "'\\ud800']"),
    "recursion": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(50000)))\nt.start()\nt.join()",
        ("", "50000")),
    "standard input by its file": ("print(open(0).read().strip()[::-1])", ("ab\n", "ba")),
    "main guard and exit": ("def main(): print(input())\nif __name__ == '__main__':\n"
                            "    main()\n    exit()", ("é", "é")),
    "temporary file": ("open('a.txt', 'w').write('hi')\nprint(open('/tmp/a.txt').read())",
                       ("", "hi")),
}  # fmt: skip


@pytest.fixture(scope="module")
def right():
    return together({
        name: lambda program=program, test=test: run_tests(program, [test], **PATIENCE)
        for name, (program, test) in RIGHT.items()
    })  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_every_form_of_a_test_is_understood(right, name):
    result, _ = right[name]
    assert result.error is None and result.passed == result.total >= 1, result


@pytest.fixture(scope="module")
def wrong():
    """Each right program with something else expected, and with another program's source."""
    programs = {
        "pair of texts": ("print(4)", "wrong answer in test 1: line 1: '4' where '3' is"),
        "tolerance": ("print(0.3336)", "wrong answer"),
        "APPS function": ("def add(a, b): return a - b", "wrong answer in test 1: -1 where 3"),
        "fn": ("def add(a, b): return str(a + b)", "wrong answer in test 1: '3' where 3"),
        "LiveCodeBench function": ("def other(): pass", "NameError"),
        "assertion": ("def add(a, b): return 4", "wrong answer in test 1"),
        "HumanEval": ("def add(a, b): raise ValueError('no')", "ValueError: no"),
        "objects": ("class Node: pass", "failed in test 1: NameError"),
        "stdin, stdout": ("print(3)\nraise ValueError('late')", "exit code 1 in test 1: Value"),
        "typed stdin": ("def f(:\n", "syntax error"),
        "pytest": ("def add(a, b): return 3", "failed in test 1: TypeError"),
    }
    calls = {
        name: lambda name=name, program=program: run_tests(program, [RIGHT[name][1]], **PATIENCE)
        for name, (program, _) in programs.items()
    }
    return {
        name: (*outcome, programs[name][1]) for name, outcome in together(calls).items()
    }  # fmt: skip


def test_wrong_programs_fail_and_say_why(wrong):
    for name, (result, _, reason) in wrong.items():
        assert result.passed < result.total, name
        assert reason in result.error, (name, result.error)


def test_tests_are_counted_one_by_one():
    program = (
        "def f(x):\n    if x == 2: return 0\n    if x == 3: import os; os._exit(0)\n    return x"
    )
    tests = [f"assert f({x}) == {x}" for x in range(6)] + [{"fn": "f", "args": [1], "expected": 1}]
    result = run_tests(program, tests, **PATIENCE)
    assert (result.passed, result.total) == (5, 7)
    assert result.error.startswith("wrong answer in test 3")
    first = run_tests(program, tests, stop_at_failure=True, **PATIENCE)
    assert (first.passed, first.total) == (2, 7)


def test_reference_solutions_pass_and_mutants_fail():
    calls = {}
    for task in TASKS:
        lines = task["program"].rstrip().split("\n")
        mutant = "\n".join([*lines[:-1], lines[-1].replace("return", "return None and", 1)])
        assert mutant != task["program"].rstrip(), task["id"]
        calls[task["id"]] = lambda t=task: run_tests(t["program"], t["tests"], **PATIENCE)
        calls[task["id"], "mutant"] = lambda t=task, m=mutant: run_tests(m, t["tests"], **PATIENCE)
    for name, (result, _) in together(calls).items():
        assert (result.passed == result.total) == isinstance(name, str), (name, result)


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ({}, "none of the fields"),
        (3, "int"),
        ({"input": "1"}, "expected"),
        ({"input": "1", "output": "1", "type": "magic"}, "magic"),
        ({"input": 1, "output": object(), "fn": "f"}, "plain data"),
        ("assert f(1", "parse"),
        ("assert 1 == 1", "no function"),
        ({"test": "def check(candidate): pass"}, "entry_point"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs but 0"),
        ({"fn": "f", "input": "[", "output": "1", "type": "functional"}, "Expecting"),
    ],
)
def test_a_test_that_cannot_be_read_is_named(test, says):
    with pytest.raises(UserError, match=rf"^test 2 .*{says}") as caught:
        run_tests("def f(x): pass", [("", ""), test])
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_named():
    for arguments in ({"language": "cobol"}, {"timeout_s": 0}, {"memory_mb": -1}):
        with pytest.raises(UserError, match=next(iter(arguments))):
            run_tests("", [("", "")], **arguments)
    with pytest.raises(UserError, match="no test"):
        run_tests("", [])
    with pytest.raises(UserError, match=r"test 1 fails by itself .*no_such_module"):
        run_tests(ADD, ["import no_such_module\nassert add(1) == 1"])
    with pytest.raises(UserError, match="test 1 is a call"):
        run_tests("int main() {}", ["assert f(1) == 2"], language="cpp")


# Plain data between the two processes

atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    st.characters(categories=["Cs"]), st.complex_numbers(allow_nan=False), st.dates(),
    st.datetimes().map(lambda moment: moment.replace(fold=0)),
    st.fractions(), st.decimals(allow_nan=False),
)  # fmt: skip
keys = st.one_of(atoms, st.tuples(atoms, atoms), st.frozensets(atoms))
values = st.recursive(
    st.one_of(keys, st.sets(keys), st.builds(bytearray, st.binary())),
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.builds(deque, st.lists(inner)),
        st.dictionaries(keys, inner), st.builds(OrderedDict, st.dictionaries(keys, inner)),
    ),
    max_leaves=8,
)  # fmt: skip


def exact(value):
    """A form that tells what `==` does not: True from 1, a list from a deque."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, sorted(repr((exact(k), exact(v))) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(exact(item)) for item in value)
    if isinstance(value, (list, tuple, deque)):
        return kind, [exact(item) for item in value]
    return kind, repr(value)


@settings(max_examples=60)
@given(values)
def test_plain_data_crosses_unchanged(value):
    text = json.dumps(wire.encode(value, wire.refuse))
    back = wire.decode(json.loads(text), wire.refuse)
    assert repr(exact(back)) == repr(exact(value))


json_data = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                [
                    "int",
                    "float",
                    "bytes",
                    "builtin",
                    "text",
                    "ref",
                    "set",
                    "dict",
                    "range",
                    "Counter",
                ]
            ),
            inner,
            max_size=2,
        ),
    ),
)


@settings(max_examples=60)
@given(json_data)
def test_forged_data_is_refused_or_plain(data):
    safe = (
        int,
        float,
        str,
        bytes,
        list,
        set,
        dict,
        range,
        complex,
        Counter,
        bool,
        type(None),
        type,
    )
    safe = (*safe, type({}.keys()), date, datetime, Decimal, Fraction)
    try:
        value = wire.decode(data, wire.refuse)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError):
        return
    assert type(value) in safe


FIELDS = ["input", "output", "fn", "args", "expected", "test", "type", "inputs", "outputs"]
records = st.recursive(
    st.one_of(st.none(), st.text(), st.integers(), st.just("functional")),
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from([*FIELDS, "entry_point", "metadata"]), inner),
    ),
)


@settings(max_examples=60)
@given(records)
def test_wild_records_are_read_or_refused(record):
    try:
        read = read_tests([record])
    except UserError as error:
        reason = str(error)
    else:
        reason, _ = "test 1 ", json.dumps([vars(t) if isinstance(t, Stdin) else t for t in read])
    assert reason.startswith("test 1 ")


# Attacks


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What an escaped program would reach: a file, a variable, a server, a mark in /tmp."""
    home = tmp_path_factory.mktemp("home")
    (home / "secret").write_text("SECRET-0123456789abcdef")
    place = {"{home}": str(home), "{secret}": str(home / "secret"), "{mark}": secrets.token_hex(8),
             "{nap}": str(secrets.randbelow(10**8) + 10**8)}  # fmt: skip
    os.environ["R1KERN_TEST_SECRET"] = "SECRET-0123456789abcdef"
    with socket.create_server(("127.0.0.1", 0)) as server:
        place["{port}"] = str(server.getsockname()[1])
        yield place
    del os.environ["R1KERN_TEST_SECRET"]


def filled(program: str, place: dict) -> str:
    for name, value in place.items():
        program = program.replace(name, value)
    return attacks.DENIED + program + '\nprint("contained")\n'


@pytest.fixture(scope="module")
def children():
    """What this process, which other tests share, had started before the attacks."""
    return set(psutil.Process().children(recursive=True))


@pytest.fixture(scope="module")
def outcomes(outside, children):
    """Every attack's result, run four at a time."""
    calls = {}
    for name, program in attacks.FORGERIES.items():
        secret = f"SECRET-{secrets.token_hex(8)}"
        tests = [
            f"assert f(7) == {secret!r}",
            {"fn": "f", "args": [[7]], "expected": [secret]},
            {"test": f"def check(candidate):\n    assert candidate(7) == {secret!r}\n"
                     f"    assert candidate([7]) == [{secret!r}]", "entry_point": "f"},
            f"assert abs(f(7) - {secrets.randbelow(10**9) + 0.5}) < 1e-6",
            {"input": "7", "output": secret},
        ]  # fmt: skip
        calls["forge", name] = lambda p=program, t=tests: run_tests(p, t, timeout_s=10)
    for index, (program, test) in enumerate(attacks.NAMES):
        calls["name", index] = lambda p=program, t=test: run_tests(p, [t], **PATIENCE)
    for name, program in attacks.ESCAPES.items():
        text = filled(program, outside)
        test = ("", "contained")
        tests = [test, test] if "next program" in name else [test]
        calls["escape", name] = lambda p=text, t=tests: run_tests(p, t, **PATIENCE)
    for name, (program, reason) in attacks.HOGS.items():
        limit = 1.0 if reason in ("timeout", "") else 60.0  # those end by themselves, soon
        for tests in (["assert f(1) == 1"], [("", "1")]):
            calls["hog", name, len(tests[0]) > 2] = lambda p=program, t=tests, s=limit: run_tests(
                p, t, timeout_s=s, memory_mb=256
            )
    return together(calls)


@pytest.mark.parametrize("name", attacks.FORGERIES)
def test_no_verdict_is_forged(outcomes, name):
    result, _ = outcomes["forge", name]
    assert result.passed == 0 and result.total == 5 and result.error, result


@pytest.mark.parametrize("index", range(len(attacks.NAMES)))
def test_no_comparison_is_taken_from_the_program(outcomes, index):
    result, _ = outcomes["name", index]
    assert result.passed == 0 and result.error, result


@pytest.mark.parametrize("name", attacks.ESCAPES)
def test_nothing_outside_is_reached(outcomes, name):
    result, _ = outcomes["escape", name]
    assert result.passed == result.total, result.error


@pytest.mark.parametrize("name", attacks.HOGS)
def test_time_and_memory_are_bounded(outcomes, name):
    _, reason = attacks.HOGS[name]
    for form in (True, False):
        result, seconds = outcomes["hog", name, form]
        assert result.passed == 0 and result.error
        assert reason in result.error
        assert seconds < 60  # most have a deadline of 1 s; the machine may be busy


def test_attacks_leave_nothing_behind(outcomes, outside, children):
    """No process, no file, no open descriptor; the machine's own files are as they were."""
    assert set(psutil.Process().children(recursive=True)) <= children
    naps = [p.pid for p in psutil.process_iter(["cmdline"])
            if any(outside["{nap}"] in part for part in p.info["cmdline"] or ())]  # fmt: skip
    assert not naps
    assert not Path("/tmp", outside["{mark}"]).exists()
    assert os.listdir(outside["{home}"]) == ["secret"]
    before = len(os.listdir("/proc/self/fd"))
    run_tests(ADD, ["assert add(1) == 1", ("", "")], **PATIENCE)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_deadline_is_kept_when_idle():
    """Two tests may time out, the others are not tried."""
    began = time.monotonic()
    result = run_tests("import time\ntime.sleep(99)", [("", "")] * 20, timeout_s=0.5)
    assert result.passed == 0 and result.total == 20 and time.monotonic() - began < 15


def test_the_programs_children_end_with_us():
    """A program under test does not outlive a trainer that is killed."""
    nap = str(secrets.randbelow(10**8) + 10**8)
    program = f"import os\nos.execv('/bin/sleep', ['sleep', '99.{nap}'])"
    code = "from r1kern.rewards.code import run_tests\n"
    code += f"run_tests({program!r}, [('', '')], timeout_s=90)"
    trainer = subprocess.Popen([sys.executable, "-c", code])

    def sleeping():
        commands = [p.info["cmdline"] or [""] for p in psutil.process_iter(["cmdline"])]
        return [c for c in commands if c[0] == "sleep" and nap in c[-1]]

    wait_until(sleeping)  # the program runs
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not sleeping())


def wait_until(condition, seconds: float = 90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


# C++


def test_cpp_programs():
    program = (
        '#include <cstdio>\nint main() {{ int a, b; scanf("%d %d", &a, &b); printf("%d\\n", {}); }}'
    )
    calls = {
        text: lambda t=text: run_tests(
            program.format(t), [("1 2", "3"), ("3 4", "7")], language="cpp", **PATIENCE
        )
        for text in ("a + b", "a * b", "a +", "a / (b - 2)")
    }
    results = {text: result for text, (result, _) in together(calls).items()}
    assert results["a + b"].passed == 2 and results["a + b"].error is None
    assert results["a * b"].passed == 0 and "wrong answer" in results["a * b"].error
    assert results["a +"].passed == 0 and results["a +"].error.startswith("compile error")
    assert "exit code 136" in results["a / (b - 2)"].error  # SIGFPE


@pytest.mark.full
def test_cpp_attacks_are_contained():
    calls = {
        name: lambda p=program: run_tests(
            p, [("", "root")], language="cpp", timeout_s=5, memory_mb=256
        )
        for name, program in attacks.CPP_ATTACKS.items()
    }
    for name, (result, _) in together(calls).items():
        assert result.passed == 0 and result.error, name
        assert "escaped" not in result.error


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    for program in ("prlimit", "cat", "sh"):
        (tmp_path / program).symlink_to(shutil.which(program))
    environment = {"PATH": str(tmp_path)}
    monkeypatch.setattr("r1kern.rewards.programs.sandbox.ENVIRONMENT", environment)
    with pytest.raises(UserError, match=r"apt install g\+\+"):
        run_tests("int main() {}", [("", "")], language="cpp", unsafe_local=True)


# Without bubblewrap


def test_no_sandbox_is_a_refusal_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"missing.*apt install bubblewrap.*unsafe_local: true"):
        run_tests(SUM, [("1", "1")])
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1")
    broken.chmod(0o755)
    for tests in ([("1", "1")], ["assert f(1) == 1"]):
        with pytest.raises(UserError, match=r"No permissions.*unsafe_local: true") as caught:
            run_tests(SUM, tests)
        assert "\n" not in str(caught.value)
    with CodeGrader() as grader:
        (verdict,) = grader.grade([(SUM, [("1", "1")])])
    assert not verdict.correct and "No permissions" in verdict.failure


def processes_with(word):
    commands = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [command for command in commands if word in command]


def test_unsafe_local_tests_without_bubblewrap(tmp_path, monkeypatch):
    folder = os.path.dirname(shutil.which("prlimit"))
    monkeypatch.setenv("PATH", folder)
    monkeypatch.setattr("shutil.which", lambda name: None)  # no bubblewrap anywhere
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    local = dict(unsafe_local=True)
    assert run_tests(SUM, [("1 2", "3")], **local, **PATIENCE).passed == 1
    assert run_tests(ADD, ["assert add(1, 2) == 3"], **local, **PATIENCE).passed == 1
    assert run_tests("print(2)", [("1 2", "3")], **local, **PATIENCE).passed == 0
    assert "memory" in run_tests("x = bytearray(1 << 34)", [("", "")], **local, **PATIENCE).error
    nap = str(secrets.randbelow(10**8) + 10**8)
    child = f"import subprocess, time\nsubprocess.Popen(['sleep', '99.{nap}'])\ntime.sleep(99)"
    assert "timeout" in run_tests(child, [("", "")], timeout_s=2.0, **local).error
    end = time.monotonic() + 20  # killed it is; its death may take the kernel a moment
    while left := processes_with(nap):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


# The grader of the loop


def test_a_completion_s_program_is_found():
    block = "text\n```{}\n{}\n```\nmore"
    assert program_of(block.format("python", "a")) == ("a\n", "python")
    assert program_of(block.format("C++", "a")) == ("a\n", "cpp")
    assert program_of(block.format("", "a")) == ("a\n", "python")
    assert program_of(block.format("py", "a") + block.format("text", "b")) == ("a\n", "python")
    assert program_of(block.format("py", "a") + "\n" + block.format("py", "b"))[0] == "b\n"
    thought = "<think>" + block.format("python", "a") + "</think>"
    assert program_of(thought)[0] == ""
    assert program_of(thought + "<answer>\nprint(1)\n</answer>")[0].strip() == "print(1)"
    assert program_of("<think> never closed " + block.format("py", "a"))[0] == ""
    assert program_of("print(1)") == ("print(1)", "python")


def test_the_grader_judges_in_the_background():
    answer = "<think> hm </think> <answer>\n```python\n{}\n```\n</answer>"
    tests = (
        json.dumps("assert add(1, 2) == 3"),
        json.dumps({"fn": "add", "args": [4], "expected": 4}),
    )
    with CodeGrader(Sandbox(timeout_s=60.0, workers=2)) as grader:
        began = time.monotonic()
        slow = grader.submit(answer.format("import time\ntime.sleep(1)\n" + ADD), tests)
        assert time.monotonic() - began < 0.5 and not slow.done()
        items = [
            (answer.format(ADD), tests),
            (answer.format("def add(a, b): return 3"), tests),
            ("<think> no end", tests),
            (answer.format(ADD), ["assert add("]),
            (ADD, []),
        ]
        found = grader.grade(items)
        assert slow.result() == Verdict(True)
    assert found[:3] == [Verdict(True), Verdict(False), Verdict(False)]
    assert "test 1 cannot be read" in found[3].failure and "no test" in found[4].failure


def test_many_threads_at_once():
    """Threads do not inherit each other's pipes, nor do their programs meet."""
    programs = [(f"def f(x): return x + {n}", f"assert f(1) == {n + 1}") for n in range(24)]
    results = [None] * len(programs)

    def work(index):
        results[index] = run_tests(programs[index][0], [programs[index][1]], **PATIENCE)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result.passed == 1 for result in results)
