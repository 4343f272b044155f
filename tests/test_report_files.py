"""Whatever a folder holds becomes a page of harmless text, or one line of error."""

from __future__ import annotations

import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_folders import HOSTILE, LIMIT, encodable, group, stage, write_run

from r1kern import cli
from r1kern.distributed import World
from r1kern.errors import UserError
from r1kern.report.html import make_report, write_report
from r1kern.report.machine import record_machine
from r1kern.report.page.records import number
from r1kern.report.page.reflection import reflections
from r1kern.report.page.text import visible
from r1kern.report.rollouts import step_file, write_rollouts


def test_other_kinds_of_runs(tmp_path):
    """A reward model and PPO; a run that has yet to write its first step."""
    for name, config, record, told in (
        (
            "reward",
            {"data": {"reads": "summary"}},
            {"accuracy": 0.7, "margin": 1.5},
            "Reward model",
        ),
        ("ppo", {"grpo": {}, "ppo": {"lam": 1.0}}, {"value/mean": 0.4}, "Value model"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        assert "0 steps" in make_report(folder).read_text()
        lines = [
            json.dumps({"step": i} | {k: v + i / 10 for k, v in record.items()}) for i in range(2)
        ]
        lines.append(json.dumps({"step": 1, "eval/accuracy": 0.6}))
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        page = make_report(folder).read_text()
        assert told in page
        assert "60.0 %" in page
        assert all(key.rpartition("/")[2] in page for key in record)


def test_long_runs_stay_small(tmp_path):
    run = write_run(tmp_path / "run", steps=2000, texts=("&" * 9000, "<" * 9000, "wait " * 2000))
    assert make_report(run).stat().st_size < LIMIT
    stages = [stage(f"s{i}", run="run") for i in range(9)]
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": stages}))
    assert make_report(tmp_path).stat().st_size < LIMIT


class Page(HTMLParser):
    """Elements of a page, and the texts of its completions."""

    def __init__(self, page: Path):
        super().__init__()
        self.elements: dict[str, int] = {}
        self.texts: list[str] = []
        self._depth = 0
        self.feed(page.read_bytes().decode())

    def handle_starttag(self, tag, attrs):
        self.elements[tag] = self.elements.get(tag, 0) + 1
        assert not [name for name, _ in attrs if name.startswith("on")]
        if "text" in (dict(attrs).get("class") or "").split():
            self.texts.append("")
            self._depth = 1

    def handle_endtag(self, tag):
        self._depth = 0 if tag == "div" else self._depth

    def handle_data(self, data):
        if self._depth:
            self.texts[-1] += data


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
@example(encodable("".join(HOSTILE)))
@example("wait</mark><script>wait")
def test_any_completion_is_only_text(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("{}")
    write_rollouts(step_file(folder, 1), [group(0, (text,), 1)])
    page = Page(make_report(folder))
    assert page.texts == [visible(text)]
    charts = page.elements.get("svg", 0)
    assert page.elements["script"] == charts + 1
    assert not {"img", "iframe", "object"} & set(page.elements)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "inputs", "run", "counts", "accuracy", "pass@1", "step", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
NAMES = ("metrics.jsonl", "pipeline.json", "results.json", "config.yaml", "machine.json")


@settings(max_examples=80)
@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.binary(max_size=30)
        | VALUES.map(lambda v: json.dumps(v).encode())
        | st.lists(VALUES, max_size=3).map(lambda v: json.dumps({"stages": v}).encode())
        | st.lists(VALUES, max_size=3).map(lambda v: json.dumps({"benchmarks": {"a": v}}).encode()),
        min_size=1,
    )
)
@example({"metrics.jsonl": b"[" * 100_000})
@example(
    {"metrics.jsonl": b'{"step": 1' + b"0" * 400 + b', "loss": 1e999}\n{"step": 3, "loss": 2}'}
)
@example({"metrics.jsonl": b'{"step": 0, "loss": 1}\n{"step": 9000000000, "loss": 1}'})
@example({"pipeline.json": b'{"stages": [{"run": "\\u0000"}, {"run": ".."}]}'})
@example({"config.yaml": b"model: {path: !!python/object:os.system {}}"})
def test_any_files_make_a_page(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("run")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if {"metrics.jsonl", "pipeline.json", "results.json", "config.yaml"} & set(files):
        Page(make_report(folder))
    else:
        with pytest.raises(UserError, match=r"^[^\n]*$"):
            make_report(folder)


def test_mistakes_are_one_line(tmp_path, caplog):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no run, pipeline or evaluation"):
        make_report(empty)
    with pytest.raises(UserError, match="is no folder"):
        make_report(tmp_path / "gone")
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        make_report(run, "/proc/report.html")
    assert write_report(run, "/proc/report.html") is None
    assert "no report of" in caplog.text
    assert write_report(run) == run / "report.html"


def test_command(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert cli.run(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "report: " in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert cli.run(["report", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_tells_its_machine(tmp_path):
    run = write_run(tmp_path / "run")
    record_machine(run, World(0, 4, torch.device("cpu"), 2, 1, 1, 2, 0, True))
    page = make_report(run).read_text()
    assert f"4 processes, {cpu_name()}" in page
    assert f"torch {torch.__version__}" in page


def cpu_name() -> str:
    """Another source than the one the run asks."""
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    return re.search(r"Model name:\s*(.+)", lines)[1].strip()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Wait, wait. Wait. That's an aha moment", ["Wait", "wait", "Wait", "aha"]),
        ("Let's reevaluate this; then re-check it.", ["reevaluate", "re-check"]),
        ("等等, 重新检查一下", ["等等", "重新检查"]),
        ("the waiter awaits 3 reduced requests", []),
        ("", []),
    ],
)
def test_reflections(text, found):
    assert [text[a:b] for a, b in reflections(text)] == found


def test_number():
    assert [number(v) for v in (True, "1", None, math.nan, math.inf, 10**400, 3, -0.5)] == [
        *[None] * 6,
        3.0,
        -0.5,
    ]
