"""The page of a run, a pipeline, an evaluation, looked at in a real browser."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from browser import Browser
from PIL import Image
from report_folders import (
    HOSTILE,
    LIMIT,
    MISSING,
    STEPS,
    encodable,
    metrics_of,
    write_pipeline,
    write_run,
)

from r1kern.report.html import make_report
from r1kern.report.page.text import visible


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
        grounds[scheme] = [sum(c) / 3 for c in (max(colours)[1], image.getpixel((3, 3)))]
        wide = browser.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels wide on a screen of {width}"
    assert min(grounds["light"]) > 200 > 60 > max(grounds["dark"])


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
    assert sorted(edges) == ["generator", "records"]  # the long one has no words
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
    ends = browser.evaluate(
        "[...document.querySelectorAll('.points .track, .points .scale div')].map("
        "e => e.getBoundingClientRect()).map(b => b.left + ' ' + b.right)"
    )
    assert len(set(ends)) == 1, "the bars lie over their scale"
    assert bars[0][0] == pytest.approx([0.6, 0.2], abs=0.01)
    assert [bar[-1][0] for bar in bars] == pytest.approx([0.713, 0.5], abs=0.01)
    assert "aime_2024: 4 problems left out" in browser.evaluate("document.body.innerText")
