import hashlib
import json
import random
import socket
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1kern.data import gsm8k
from r1kern.data.cold_start import cold_start_pairs, worked, write_cold_start
from r1kern.data.dataset import load_pairs, load_prompts
from r1kern.data.records import read_records
from r1kern.data.stream import Stream
from r1kern.data.template import R1_ZERO_PREFIX, R1_ZERO_SUFFIX, render
from r1kern.data.tiny_model import QWEN, write_model
from r1kern.data.tokenizer import CHARACTERS, build_demo_tokenizer, load_tokenizer
from r1kern.errors import UserError
from r1kern.rewards.format import TAGS, format_reward
from r1kern.rewards.math import verify
from r1kern.types import Prompt

TOKENIZER = build_demo_tokenizer()
ROWS = [
    {"id": "a", "problem": "1+1", "answer": "2", "kind": "add"},
    {"id": "b", "problem": "3-1", "answer": 2, "kind": "sub"},
    {"id": "c", "problem": "what is {x} in {}?", "answer": "0.5", "kind": "text"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(source, **changes):
    options = {"tokenizer": TOKENIZER, "template": "r1-zero", "max_prompt_tokens": 64, **changes}
    return load_prompts(source, **options)


def pairs(source, **changes):
    options = {"tokenizer": TOKENIZER, "template": "r1-zero", "max_tokens": 64, **changes}
    return load_pairs(source, **options)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---------------------------------------------------------------- templates and tokenizer


def test_the_r1_zero_template_is_the_papers():
    # sha256 of Table 1 as printed in arXiv 2501.12948v1, "prompt" in the problem's place
    printed = "7ea49a7d669beb46a7f1c4ea963e6514926f8d8fcb9ed3c3abd4eb1b7cb653c3"
    text = render("r1-zero", "prompt", TOKENIZER)
    assert hashlib.sha256(text.encode()).hexdigest() == printed


@given(st.text(st.sampled_from("{}%$\\<>/ ab1"), min_size=1))
def test_templates_leave_the_problem_as_it_is(problem):
    assert render("none", problem, TOKENIZER) == problem
    r1 = render("r1-zero", problem, TOKENIZER)
    assert r1.removeprefix(R1_ZERO_PREFIX).removesuffix(R1_ZERO_SUFFIX) == problem.strip()


def test_chat_templates_are_the_tokenizers():
    tokenizer = build_demo_tokenizer()
    tokenizer.chat_template = (
        "<eos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render("chat", "{1}+1", tokenizer) == "<eos>[user]{1}+1[assistant]"


@pytest.mark.parametrize(
    ("template", "message"),
    [("r1zero", "did you mean 'r1-zero'"), ("chat", "no chat template: use template 'r1-zero'")],
)
def test_templates_that_cannot_be_used_are_refused(template, message):
    with pytest.raises(UserError, match=message):
        render(template, "1+1", TOKENIZER)


def test_template_and_tags_are_single_tokens():
    text = render("r1-zero", "48+24", TOKENIZER) + "<think> </think> <answer> 72 </answer>"
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == 2 + len("48+24") + len(TAGS) + len("    ") + len("72")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert len(TOKENIZER) == TOKENIZER.vocab_size == max(TOKENIZER.get_vocab().values()) + 1 == 104
    assert not {TOKENIZER.pad_token, TOKENIZER.eos_token, TOKENIZER.unk_token} & set(TAGS)


pieces = st.sampled_from([*CHARACTERS, *TAGS, R1_ZERO_PREFIX, R1_ZERO_SUFFIX, "  ", " .", "\n\n"])


@given(st.lists(pieces).map("".join))
def test_decoding_gives_back_the_text(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


def test_a_saved_tokenizer_is_the_same(tmp_path, no_network):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = render("r1-zero", "4 , 8", loaded) + "<think> a . b </think> <answer>\n7 !</answer>`é"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    ids = [*loaded(text)["input_ids"], loaded.eos_token_id]
    assert loaded.decode(ids, skip_special_tokens=True) == text[:-2]
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    special = (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id)
    assert special == (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id)


def test_the_architecture_does_not_change_the_tokenizer(tmp_path, no_network):
    """AutoTokenizer would split by Qwen2's rules and lose the spaces around tags."""
    folder = write_model(tmp_path / "qwen", QWEN, TOKENIZER)
    text = "<think> 1 + 2 </think> <answer> 3 </answer>"
    loaded = load_tokenizer(folder)
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path, no_network):
    for folder in (tmp_path / "nothere", tmp_path):
        with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer.json.*copy it there"):
            load_tokenizer(folder)
    tokenizer = build_demo_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token: set eos_token"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- loading


def sources(tmp_path):
    jsonl(tmp_path / "rows.jsonl", ROWS)
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    return [
        tmp_path / "rows.jsonl",
        str(tmp_path / "rows.json"),
        tmp_path / "rows.parquet",
        tmp_path / "saved",
        tmp_path / "splits" / "train",
    ]


def test_every_kind_of_source_gives_the_same_prompts(tmp_path, no_network):
    for source in sources(tmp_path):
        loaded = prompts(source)
        assert [(p.id, p.answer) for p in loaded] == [("a", "2"), ("b", "2"), ("c", "0.5")]
        assert loaded[2].text == f"{R1_ZERO_PREFIX}what is {{x}} in {{}}?{R1_ZERO_SUFFIX}"
        assert all(TOKENIZER.decode(p.ids) == p.text for p in loaded)


def test_where_keeps_the_records_asked_for(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert [p.id for p in prompts(source, where={"kind": ["add", "text"]})] == ["a", "c"]
    assert [p.id for p in prompts(source, where={"kind": ["add", "sub"], "answer": [2]})] == [
        "a",
        "b",
    ]
    with pytest.raises(UserError, match=r"none of the 3 records .* matches"):
        prompts(source, where={"kind": ["mul"]})


def test_fields_can_be_named_and_ids_are_optional(tmp_path):
    source = jsonl(tmp_path / "r.jsonl", [{"question": "1+1", "gold": 2}])
    (prompt,) = prompts(source, problem_field="question", answer_field="gold")
    assert (prompt.id, prompt.answer) == (f"{source}:1", "2")


def test_pairs_end_with_the_end_of_sequence_token(tmp_path):
    rows = [{"problem": "1+1", "completion": "<think> </think> <answer> 2 </answer>"}]
    (pair,) = pairs(jsonl(tmp_path / "pairs.jsonl", rows))
    assert TOKENIZER.decode(pair.prompt_ids) == render("r1-zero", "1+1", TOKENIZER)
    assert pair.completion_ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(pair.completion_ids[:-1]) == rows[0]["completion"]


def test_pairs_need_an_end_of_sequence_token(tmp_path):
    tokenizer = build_demo_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        pairs(jsonl(tmp_path / "p.jsonl", ROWS), tokenizer=tokenizer)


LONG = {"id": "long", "problem": "1+1" * 30, "answer": "2", "completion": "2"}


@pytest.mark.parametrize("load", [prompts, pairs])
def test_records_over_the_budget_are_named_or_dropped(tmp_path, caplog, load):
    source = jsonl(tmp_path / "r.jsonl", [{**ROWS[0], "completion": "2"}, LONG])
    size = {prompts: 92, pairs: 94}[load]
    pattern = rf"r.jsonl:2: .* 'long' has {size} tokens, the budget is 64 \(1 of 2 .*overlong: drop"
    with pytest.raises(UserError, match=pattern):
        load(source)
    assert len(load(source, overlong="drop")) == 1
    assert "dropped 1 of 2" in caplog.text
    with pytest.raises(UserError, match="overlong must be"):
        load(source, overlong="cut")
    with pytest.raises(UserError, match=r"\(1 of 1 are over\): raise the budget"):
        load(jsonl(tmp_path / "only.jsonl", [LONG]), overlong="drop")


GOOD = json.dumps(ROWS[0]).encode() + b"\n"
BAD_FILES = [
    ("bad.jsonl", b"", r"bad.jsonl is empty"),
    ("bad.jsonl", b"\n \n", r"bad.jsonl is empty"),
    ("bad.jsonl", GOOD + b"\n{'id': 1}\n", r"bad.jsonl:3: malformed JSON \(column 2: .*correct"),
    ("bad.jsonl", GOOD + GOOD[:20], r"bad.jsonl:2: malformed JSON"),
    ("bad.jsonl", b"[" * 100_000, r"bad.jsonl:1: malformed JSON"),
    ("bad.jsonl", GOOD + b'{"id": "\xff"}\n', r"bad.jsonl:2: not UTF-8 text: convert"),
    ("bad.jsonl", GOOD + b"[1]\n", r"bad.jsonl:2: must be a JSON object, not a list"),
    ("bad.jsonl", b'{"answer": "2"}\n', r"bad.jsonl:1: no field 'problem': add it.*\['answer'\]"),
    ("bad.jsonl", b'{"problem": "1"}\n', r"bad.jsonl:1: no field 'answer'"),
    (
        "bad.jsonl",
        b'{"problem": 1, "answer": "2"}\n',
        r":1: field 'problem' must be text, not a va",
    ),
    ("bad.jsonl", b'{"problem": "1", "answer": null}\n', r"'answer' must be text, not null"),
    ("bad.jsonl", b'{"problem": "1", "answer": ["2"]}\n', r"'answer' must be text, not a list"),
    ("bad.jsonl", b'{"problem": "1", "answer": true}\n', r"must be text, not true or false"),
    ("bad.jsonl", b'{"problem": " ", "answer": "2"}\n', r"'problem' is blank"),
    ("bad.jsonl", GOOD + GOOD, r"bad.jsonl:2: id 'a' is taken by .*bad.jsonl:1: make ids unique"),
    ("bad.json", b'[\n{"id":\n]', r"bad.json:3: malformed JSON"),
    ("bad.json", b"{}", r"must hold an array of objects, not an object"),
    ("bad.json", b"[]", r"bad.json is empty"),
    ("bad.parquet", b"PAR", r"bad.parquet: not a parquet file"),
    ("bad.csv", b"a,b", r"bad.csv: unknown kind of data file \(give a .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path, no_network, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prompts(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothere.jsonl", r"no such data file: nothere.jsonl \(give a .jsonl"),
        ("some/nothere.jsonl", r"no such data file: some/nothere.jsonl [^;]*$"),
        ("openai/gsm8k", r"no such data file: openai/gsm8k .*write hub:openai/gsm8k"),
        ("/nowhere/at/all", r"no such data file"),
        ("bundled:nothere", r"no bundled data set 'nothere': choose one of .*gsm8k_arith_train"),
        ("hub:gsm8k", r"not of the form hub:owner/name"),
    ],
)
def test_missing_sources_are_refused_without_network(no_network, source, message):
    with pytest.raises(UserError, match=message) as error:
        prompts(source)
    assert "\n" not in str(error.value)


def test_folders_without_a_data_set_are_refused(tmp_path, no_network):
    with pytest.raises(UserError, match="folder without a saved data set"):
        prompts(tmp_path)
    sources(tmp_path)
    with pytest.raises(UserError, match=r"several splits: name one of \['.*splits/train'\]"):
        prompts(tmp_path / "splits")
    for shard in (tmp_path / "saved").glob("*.arrow"):
        shard.unlink()
    with pytest.raises(UserError, match="saved cannot be loaded"):
        prompts(tmp_path / "saved")


def test_an_unreachable_hub_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub:owner/nothere:test cannot be loaded") as error:
        prompts("hub:owner/nothere:test")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the stream of prompts


def numbered(count):
    return [Prompt(id=str(i), ids=(i,), answer="0", text="") for i in range(count)]


@given(st.integers(1, 12), st.lists(st.integers(1, 30), max_size=12), st.integers(0, 5))
def test_a_stream_visits_every_prompt_once_an_epoch(size, counts, seed):
    stream = Stream(numbered(size), seed)
    ids = [prompt.id for count in counts for prompt in stream.next(count)]
    assert len(ids) == sum(counts)
    for start in range(0, len(ids) - size + 1, size):
        assert sorted(ids[start : start + size], key=int) == [str(i) for i in range(size)]


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 40))
def test_a_restored_stream_goes_on(size, before, after):
    whole, first, second = (Stream(numbered(size), 7) for _ in range(3))
    expected = whole.next(before + after)
    if before:
        assert first.next(before) == expected[:before]
    second.next(5)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.next(after) == expected[before:]


def test_orders_differ_by_epoch_and_seed():
    stream, other = Stream(numbered(50), 1), Stream(numbered(50), 2)
    first, second = stream.next(50), stream.next(50)
    assert first != second
    assert first != other.next(50)
    assert first != numbered(50)


def test_a_stream_refuses_another_runs_state():
    stream = Stream(numbered(5), 1)
    with pytest.raises(UserError, match="other training data"):
        stream.restore(Stream(numbered(6), 1).state())
    with pytest.raises(UserError, match="seed 2, not 1"):
        stream.restore(Stream(numbered(5), 2).state())
    with pytest.raises(UserError, match="data set is empty"):
        Stream([], 1)


# ---------------------------------------------------------------- the bundled problems


def bundled(split):
    return [record.values for record in read_records(f"bundled:gsm8k_arith_{split}")]


def test_bundled_problems_are_right_and_held_out():
    keys = {}
    for split in ("train", "val", "test"):
        rows = bundled(split)
        assert len({row["id"] for row in rows}) == len(rows)
        assert {row["split"] for row in rows} == {split}
        for row in rows:
            assert str(eval(row["problem"])) == row["answer"]
            operators = [c for c in row["problem"] if c in "+-*"]
            kind = {"+": "add", "-": "sub", "*": "mul"}[operators[0]]
            assert row["kind"] == ("chain" if len(operators) == 2 else kind)
        keys[split] = {gsm8k.canonical(row["problem"]) for row in rows}
    assert not keys["test"] & (keys["train"] | keys["val"])
    assert not keys["train"] & keys["val"]
    assert len(bundled("val")) == gsm8k.VALIDATION_SIZE == len(keys["val"])
    assert len(keys["test"]) == len(bundled("test"))
    kinds = Counter(row["kind"] for row in bundled("test"))
    assert kinds["add"] + kinds["sub"] >= 200
    files = Path(gsm8k.__file__).parent / "files"
    assert sum(file.stat().st_size for file in files.iterdir()) < 1_000_000
    assert "MIT License" in (files / "LICENSE-GSM8K.txt").read_text()


def test_bundled_problems_fit_the_demo():
    loaded = prompts("bundled:gsm8k_arith_train", max_prompt_tokens=16)
    assert len(loaded) == len(bundled("train"))


def test_derivation_reads_annotations(tmp_path):
    train = [
        {"answer": "<<48+24=72>> <<24+48=72>> <<1,000-1=999>> <<2.5*2=5>> <<48/2=24>> <<3*4=13>>"},
        {"answer": "<<5 + 3*28=89>> <<12*34=408>> <<3-5=-2>> <<48+24=72>>\n#### 72"},
    ]
    test = [{"answer": "<<24+48=72>> <<7*8=56>> <<8*7=56>> <<3*28+5=89>> <<9-1-2=6>>"}]
    gsm8k.main(
        str(jsonl(tmp_path / "train.jsonl", train)),
        str(jsonl(tmp_path / "t.jsonl", test)),
        tmp_path,
    )
    rows = {}
    for split in ("val", "test"):
        lines = (tmp_path / f"gsm8k_arith_{split}.jsonl").read_text().splitlines()
        rows[split] = [json.loads(line)["problem"] for line in lines]
    assert rows == {"val": ["48+24", "5+3*28"], "test": ["7*8", "9-1-2"]}


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("48+24", "24+48", True),
        ("48-24", "24-48", False),
        ("3*28+5", "5+28*3", True),
        ("9-1-2", "9-2-1", True),
        ("9-1+2", "9+1-2", False),
        ("12*3", "1*23", False),
        ("2*3+4", "2+3*4", False),
    ],
)
def test_canonical_expressions(left, right, same):
    assert (gsm8k.canonical(left) == gsm8k.canonical(right)) == same


# ---------------------------------------------------------------- cold start


@pytest.mark.parametrize(
    ("problem", "careful", "careless"),
    [
        ("48+24", ("8+4=12,4+2+1=7", "72"), ("8+4=12,4+2=6", "62")),
        ("7+5", ("7+5=12", "12"), ("7+5=12", "12")),
        ("402-18", ("12-8=4,10-1-1=8,4-0-1=3", "384"), ("12-8=4,10-1=9,4-0=4", "494")),
        ("4*15", ("5*4=20,1*4+2=6", "60"), ("5*4=20,1*4=4", "40")),
        ("99+901", ("9+1=10,9+0+1=10,0+9+1=10", "1000"), ("9+1=10,9+0=9,0+9=9", "990")),
        ("12+39-5", ("12+39=51,51-5=46", "46"), ("12+39=41,41-5=46", "46")),
        ("5+3*28", ("3*28=84,5+84=89", "89"), ("3*28=64,5+64=69", "69")),
        ("12*8*5", ("12*8=96,96*5=480", "480"), ("12*8=86,86*5=400", "400")),
    ],
)
def test_worked_solutions(problem, careful, careless):
    assert worked(problem) == careful
    assert worked(problem, careless=True) == careless


def test_worked_solutions_of_all_bundled_problems_are_right():
    for split in ("train", "val", "test"):
        for row in bundled(split):
            assert worked(row["problem"])[1] == row["answer"]


def test_cold_start_styles_are_drawn_anew_and_fit(tmp_path):
    rows = bundled("train")
    answers = {row["problem"]: row["answer"] for row in rows}
    source = tmp_path / "pairs.jsonl"
    assert write_cold_start(answers, source, visits=3, seed=5) == 3 * len(answers)
    records = [record.values for record in read_records(source)]
    styles = Counter(record["style"] for record in records)
    total = len(records)
    assert styles["direct"] / total == pytest.approx(0.4, abs=0.02)
    assert styles["careless"] / total == pytest.approx(0.15, abs=0.02)
    drawn = {}
    for record in records:
        drawn.setdefault(record["problem"], set()).add(record["style"])
        assert format_reward(record["completion"]) == 1.0
        right = verify(record["completion"], answers[record["problem"]])
        assert right or record["style"] == "careless"
        assert ("=" in record["completion"]) == (record["style"] != "direct")
    assert sum(len(seen) > 1 for seen in drawn.values()) > 0.6 * len(drawn)
    loaded = pairs(source, max_tokens=16 + 44)
    assert max(len(pair.completion_ids) for pair in loaded) <= 44
    again = tmp_path / "again.jsonl"
    write_cold_start(answers, again, visits=3, seed=5)
    assert again.read_bytes() == source.read_bytes()


def test_cold_start_shares_can_be_chosen():
    styles = {p["style"] for p in cold_start_pairs(["48+24"] * 50, random.Random(0), direct=1)}
    assert styles == {"direct"}
    only_careless = cold_start_pairs(["48+24"] * 50, random.Random(0), direct=0, careless=1)
    assert {pair["style"] for pair in only_careless} == {"careless"}
