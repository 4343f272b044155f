"""The page of a run, a pipeline, an evaluation, looked at in a real browser."""

from __future__ import annotations

import io
import json
import math
import random
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from browser import Browser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from r1kern import cli
from r1kern.distributed import World
from r1kern.errors import UserError
from r1kern.report.html import make_report, write_report
from r1kern.report.machine import record_machine
from r1kern.report.page.records import number
from r1kern.report.page.reflection import reflections
from r1kern.report.page.text import visible
from r1kern.report.rollouts import step_file, write_rollouts
from r1kern.types import Completion, Prompt, Rollout, Score

STEPS = 60
MISSING = (20, 21, 40)  # steps, from 1, without an entropy; 40 lacks its whole line
HOSTILE = (
    "</script><script>window.pwned=1</script><!-- ]]> </style></div></div>",
    "<img src=x onerror=window.pwned=2><svg onload=window.pwned=3><iframe src=//evil.test>",
    "\u202egnp.exe\u2066 \x00\x08\x1b[31m \ufeff\u200b &lt; &#60; {{7*7}} \ud800 \"'`",
)
LIMIT = 2_000_000  # bytes of a page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield found
    found.close()


@pytest.fixture(autouse=True)
def calm(request):
    """No page complains, or asks for anything but itself."""
    yield
    if "browser" in request.fixturenames:
        found = request.getfixturevalue("browser")
        assert found.complaints == []
        assert [r for r in found.requests if not r.endswith("report.html")] == []
        assert found.evaluate("window.pwned") is None


def metrics_of(step: int) -> dict:
    """A GRPO step as the log writes it, `step` from 1."""
    draw = random.Random(step)
    return {
        "step": step - 1,
        "reward": 0.3 + step / 100 + draw.uniform(-0.1, 0.1),
        "reward/accuracy": 0.2 + step / 100,
        f"reward/{HOSTILE[0]}": draw.random(),
        "response_length": 20.0 + step * 3,
        "entropy": None if step in MISSING else 1 / step,
        "mismatch": 10.0 ** -(step % 7 + 2) if step != 5 else 0.0,
        "max_mismatch": 0.5,
        "clip_fraction": draw.random() / 50,
        "grad_norm": draw.random(),
        "tokens": 5000.0,
        "tokens_per_s": 40_000.0 + step,
        "lr": 1e-4 * (1 - step / STEPS),
        "novel_metric": draw.gauss(0, 1),
        "host/rss_gib": 3.2,
        "host/available_gib": 9.0 - step / 100,
        "seconds/rollout": 2.0 + draw.random(),
        "seconds/update": 1.0,
        "seconds/step": 4.0,
    }


def write_run(folder: Path, *, steps: int = STEPS, texts=HOSTILE) -> Path:
    """A run that was killed while it wrote a line."""
    folder.mkdir(parents=True)
    lines = [json.dumps(metrics_of(s)) for s in range(1, steps + 1) if s != MISSING[-1]]
    for done in (0, steps // 2, steps):
        rate = 0.2 + 0.6 * done / steps
        held_out = {"eval/pass@1": rate, "eval/half_interval": 0.05, "eval/cons@8": rate + 0.1}
        lines.append(json.dumps({"step": done, **held_out, "seconds/evaluate": 1.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "rew')
    config = {"model": {"path": HOSTILE[1]}, "grpo": {}, "train": {"steps": 100}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (1, 2, steps):
        write_rollouts(step_file(folder, step), [group(i, texts, step) for i in range(4)])
    (folder / "rollouts" / "step_000003.jsonl").write_bytes(b'{"group": 0, "completion": "ha')
    return folder


def group(index: int, texts: tuple[str, ...], step: int) -> Rollout:
    """Completions with rewards 0, 1, 2 ...; they reflect once the run is late."""
    late = " Wait, let me re-check." if step > 2 else ""
    return Rollout(
        Prompt(
            f"p{index} {HOSTILE[1]}",
            (1,),
            HOSTILE[0],
            HOSTILE[2].encode("utf-8", "replace").decode(),
        ),
        tuple(Completion((1, 2), (), encodable(t + late), "length") for t in texts),
        step,
        tuple(Score({HOSTILE[1]: float(i)}, float(i), None) for i in range(len(texts))),
    )


def encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def charts(browser: Browser) -> dict[str, dict]:
    """Title -> what the page's charts show, taken from their marks and ticks alone."""
    return browser.evaluate("""Object.fromEntries(
      [...document.querySelectorAll("figure.chart")].filter(f => f.querySelector("svg")).map(f => [
        f.querySelector("figcaption").textContent, {
          names: [...f.querySelectorAll(".legend span")].map(e => e.textContent),
          note: f.querySelector("p")?.textContent ?? "",
          dots: [...f.querySelectorAll(".raw, .dots")].map(e => e.getAttribute("d")),
          line: [...f.querySelectorAll(".line")].map(e => e.getAttribute("d")),
          band: f.querySelectorAll(".band").length,
          x: [...f.querySelectorAll('text.tick[text-anchor="middle"]')].map(
            e => [+e.getAttribute("x"), e.textContent]),
          y: [...f.querySelectorAll('text.tick[text-anchor="end"]')].map(
            e => [+e.getAttribute("y") - 4, e.textContent]),
          values: JSON.parse(f.querySelector("script").textContent),
        }]))""")


def read_back(marks: str, chart: dict) -> list[tuple[float, float]]:
    """(step, value) of every dot, measured against the labels of the ticks."""
    log = "log scale" in chart["title"]
    scale = {"k": 1e3, "M": 1e6}

    def tick(text: str) -> float:
        value = float(text.rstrip("kM")) * scale.get(text[-1], 1)
        return math.log10(value) if log else value

    (x0, a0), *_, (x1, a1) = [(x, float(t)) for x, t in chart["x"]]
    (y0, b0), *_, (y1, b1) = [(y, tick(t)) for y, t in chart["y"]]
    found = []
    for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", marks):
        step = a0 + (float(x) - x0) * (a1 - a0) / (x1 - x0)
        value = b0 + (float(y) - y0) * (b1 - b0) / (y1 - y0)
        found.append((step, 10**value if log else value))
    return found


def test_charts_show_what_the_run_wrote(browser, tmp_path):
    page = make_report(write_run(tmp_path / "run"))
    browser.resize(1300, 900)
    browser.scheme("light")
    browser.open(page)
    shown = charts(browser)
    for title, chart in shown.items():
        chart["title"] = title
    truth = {s: metrics_of(s) for s in range(1, STEPS + 1) if s != MISSING[-1]}
    for title, metric in {
        "Reward by term": "reward",
        "Response length": "response_length",
        "Entropy": "entropy",
        "Trainer against generator (log scale)": "mismatch",
        "Throughput": "tokens_per_s",
        "Gradient norm": "grad_norm",
        "Learning rate": "lr",
        "novel_metric": "novel_metric",
    }.items():
        chart = shown[title]
        log = "log" in title
        expected = {s: m[metric] for s, m in truth.items() if m[metric] is not None}
        expected = {s: v for s, v in expected.items() if v > 0 or not log}
        seen = read_back(chart["dots"][0], chart)
        assert [round(s) for s, _ in seen] == list(expected), title
        span = max(expected.values()) - min(0.0, *expected.values())
        for (_, value), true in zip(seen, expected.values(), strict=True):
            tolerance = 0.01 * true if log else 0.003 * span
            assert value == pytest.approx(true, abs=tolerance), title
        told = chart["values"]["series"][0]
        kept = {s: v for s, v in zip(told["x"], told["y"], strict=True) if v is not None}
        assert kept == pytest.approx(expected, rel=1e-6), title
    assert shown["Entropy"]["line"][0].count("M") == 3, "a gap at steps 20, 21 and one at 40"
    assert shown["Reward by term"]["line"][0].count("M") == 2
    assert "1 value of 0 or less" in shown["Trainer against generator (log scale)"]["note"]
    assert "centred mean" in shown["Entropy"]["note"]
    for title, chart in shown.items():  # linear axes hold 0 unless they are said not to
        if title not in ("Loss", "Probability ratio") and "log" not in title:
            assert any(float(t.rstrip("kM")) == 0 for _, t in chart["y"]), title

    accuracy = shown["Held-out accuracy"]
    assert accuracy["names"] == ["pass@1", "cons@8"]
    seen = [(round(s), round(v)) for s, v in read_back(accuracy["dots"][0], accuracy)]
    assert seen == [(0, 20), (30, 50), (60, 80)]
    assert accuracy["band"] == 2
    words = shown["Words of reflection"]["values"]["series"][0]
    assert (words["x"], words["y"]) == ([1, 2, 60], [0, 0, 2])
    bars = shown["Time by phase"]["values"]["series"]
    assert {s["name"] for s in bars} == {"rollout", "update"}
    assert bars[0]["y"][0] == pytest.approx(truth[1]["seconds/rollout"])
    text = browser.evaluate("document.body.innerText")
    assert "60 of 100 steps: unfinished" in text
    assert "metrics.jsonl: 1 line cut short" in text
    assert "20.0 ± 5.0 → 80.0 ± 5.0 %" in text


def test_pointer_and_arrow_keys_tell_values(browser, tmp_path):
    browser.open(make_report(write_run(tmp_path / "run")))
    browser.resize(1300, 900)
    find = """(() => { const f = [...document.querySelectorAll("figure.chart")].find(
        f => f.querySelector("figcaption").textContent === "Reward by term"); """
    box = browser.evaluate(
        find
        + """f.scrollIntoView(); const b = f.querySelector("svg").getBoundingClientRect();
        return [b.left, b.top, b.width, b.height]; })()"""
    )
    browser.point(box[0] + box[2] * 0.99, box[1] + box[3] / 2)
    told = browser.evaluate(find + 'return f.querySelector(".tip").innerText; })()')
    assert "step 60" in told
    reward = metrics_of(60)["reward"]
    assert f"total {reward:.4g}" in told
    tip = browser.evaluate(
        find
        + """const b = f.querySelector(".tip").getBoundingClientRect();
        return [b.left, b.top, b.right, b.bottom]; })()"""
    )
    assert box[0] <= tip[0] < tip[2] <= box[0] + box[2]
    assert box[1] <= tip[1] < tip[3] <= box[1] + box[3] + 60
    press = 'f.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); '
    told = browser.evaluate(find + press + 'return f.querySelector(".tip").innerText; })()')
    assert "step 59" in told


def test_completions_are_inert_and_bounded(browser, tmp_path):
    huge = HOSTILE[2] + "x" * 300_000 + "\n" * 100_000
    page = make_report(write_run(tmp_path / "run", texts=(*HOSTILE[:2], huge)))
    assert page.stat().st_size < LIMIT
    browser.open(page)
    assert browser.evaluate("document.scripts.length") == browser.evaluate(
        "document.querySelectorAll('figure.chart script').length + 1"
    )
    assert browser.evaluate("document.querySelectorAll('img, iframe, object, link').length") == 0
    texts = browser.evaluate("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    for text in HOSTILE:
        assert any(shown.startswith(visible(encodable(text))) for shown in texts)
    assert not re.search("[\u0000-\u0008\u202a-\u202e\u2066-\u2069]", "".join(texts))
    assert browser.evaluate("[...document.querySelectorAll('.text mark')].map(e => e.textContent)")[
        :2
    ] == ["Wait", "let me re-check"]
    longest = max(texts, key=len)
    assert len(longest) < 4100
    assert longest.count("characters left out") == 1
    before, after = browser.evaluate("""(() => {
        const text = [...document.querySelectorAll("details[open] .fold")].at(-1);
        const before = text.clientHeight; text.nextSibling.click();
        return [before, text.clientHeight]; })()""")
    assert 0 < before < after
    kinds = browser.evaluate(
        "[...document.querySelectorAll('.cards')].map(e => "
        "[...e.querySelectorAll('header b')].map(b => b.textContent).join())"
    )
    assert set(kinds) == {"best,median,worst"}


def test_pictures_in_light_dark_and_narrow(browser, tmp_path):
    browser.open(make_report(write_run(tmp_path / "run")))
    grounds = {}
    for scheme, width in (("light", 1300), ("dark", 1300), ("light", 360)):
        browser.resize(width, 1400, mobile=width < 600)
        browser.scheme(scheme)
        image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        colours = image.getcolors(2**24)
        blue = sum(n for n, (r, g, b) in colours if b > r + 60 and b > g + 30)
        assert blue > 500, f"{scheme}, {width} pixels wide: no line of a chart in sight"
        grounds[scheme] = sum(max(colours)[1]) / 3
        wide = browser.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels wide on a screen of {width}"
    assert grounds["light"] > 200 > 60 > grounds["dark"]


def stage(name: str, **more) -> dict:
    return {"name": name, "kind": "train", "state": "done", "seconds": 60, **more}


def write_pipeline(folder: Path) -> Path:
    write_run(folder / "zero")
    measured = {"pass@1": 0.25, "half_interval": 0.05, "problems": 100, "samples": 8}
    stages = [
        stage("zero", inputs={"base": "models/base"}, outputs={"model": "zero/model"}, run="zero"),
        stage(
            f"collect {HOSTILE[1]}",
            inputs={"generator": "zero/model"},
            outputs={"records": "a.jsonl"},
            counts={"sampled": 400, "kept": 100},
            dropped={HOSTILE[0]: 100, "wrong": 200},
            notes=[HOSTILE[1]],
        ),
        stage(
            "sft",
            inputs={"records": "a.jsonl", "teacher": "zero"},
            accuracy={"arith": measured},
            run="gone",
        ),
        {"name": "empty"},
        {},
        "no stage",
    ]
    (folder / "pipeline.json").write_text(json.dumps({"name": HOSTILE[0], "stages": stages}))
    return folder


def test_pipeline(browser, tmp_path):
    browser.resize(1300, 900)
    browser.open(make_report(write_pipeline(tmp_path / "pipeline")))
    shown = (
        "[...document.querySelectorAll('main > section')].filter(s => s.clientHeight)"
        ".map(s => s.id)"
    )
    assert browser.evaluate(shown) == ["tab-0"]
    assert browser.evaluate("document.querySelectorAll('.lineage .node').length") == 6
    edges = browser.evaluate(
        "[...document.querySelectorAll('.lineage .on')].map(e => e.textContent)"
    )
    assert sorted(edges) == ["generator", "records", "teacher"]
    widths = browser.evaluate(
        "[...document.querySelectorAll('#tab-0 .rows:not(.points) .track div')].map("
        "e => e.clientWidth / e.parentElement.clientWidth)"
    )
    assert widths == pytest.approx([2 / 3, 1 / 3], abs=0.02)
    text = browser.evaluate("document.body.innerText")
    assert "25.0 % ± 5.0" in text
    assert "100 problems x 8 samples" in text
    browser.evaluate("document.querySelectorAll('nav a')[1].click()")
    browser.evaluate("void dispatchEvent(new HashChangeEvent('hashchange'))")
    assert browser.evaluate(shown) == ["tab-1"]
    assert "Reward by term" in charts(browser)
    browser.evaluate("document.querySelectorAll('nav a')[3].click()")
    browser.evaluate("void dispatchEvent(new HashChangeEvent('hashchange'))")
    assert "Its run gone has written nothing yet." in browser.evaluate("document.body.innerText")


def test_evaluation(browser, tmp_path):
    aime = {"pass@1": 0.713, "cons@64": 0.867, "interval": [0.6, 0.8], "problems": 30}
    code = {"pass@1": 0.5, "interval": None, "codeforces": {"rating": 2029.0}}
    benchmarks = {
        "aime_2024": {"metrics": aime, "left_out": {"no answer": 3, "a picture": 1}},
        HOSTILE[0]: {"metrics": code},
        "flat": {"accuracy": 0.25},
    }
    (tmp_path / "results.json").write_text(
        json.dumps({"model": HOSTILE[1], "benchmarks": benchmarks})
    )
    (tmp_path / "config.yaml").write_text("model: {path: x}")
    browser.open(make_report(tmp_path))
    table = browser.evaluate(
        "[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    none = "\u2013"
    assert table == [
        ["benchmark", "pass@1", "cons@64", "problems", "codeforces/rating", "accuracy"],
        ["aime_2024", "71.3 %", "86.7 %", "30", none, none],
        [" ".join(HOSTILE[0].split()), "50.0 %", none, none, "2029", none],
        ["flat", none, none, none, none, "25.0 %"],
    ]
    bars = browser.evaluate(
        "[...document.querySelectorAll('.points .track')].map(e => [...e.children].map("
        "c => [c.offsetLeft / e.clientWidth, c.clientWidth / e.clientWidth]))"
    )
    assert bars[0][0] == pytest.approx([0.6, 0.2], abs=0.01)
    assert [bar[-1][0] for bar in bars] == pytest.approx([0.713, 0.5], abs=0.01)
    assert "aime_2024: 4 problems left out" in browser.evaluate("document.body.innerText")


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
        assert all(key in page for key in record)


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
