"""`r1kern plan`: exact parameters, memory against a real run, shipped configs, back-test."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from launch import ROOT, TESTS, python
from transformers import DeepseekV3Config

from r1kern.data.tiny_model import DEEPSEEK
from r1kern.hf.config import read_hf_config
from r1kern.hf.names import hf_shapes, shared_name
from r1kern.plan.steptime import Lengths, survival

# Counted by hand once; routing biases, which are no parameters, left out.
DEEPSEEK_V3 = 671_026_404_352  # published as 671 B
MULTI_TOKEN = 11_610_067_968  # published as 14 B, with copies of embedding and head
PARAMETERS = {
    "r1": DEEPSEEK_V3,
    "moonlight": 15_960_108_544,
    "qwen2.5": 7_615_616_512,
    "gsm8k": 1_543_714_304,
}

LONG_512 = "+".join(
    [
        "r1_671b_512",
        "parallel.tp=4",
        "rollout.max_tokens=31744",
        "eval.max_tokens=31744",
        "model.max_positions=32768",
        "train.tokens_per_microbatch=32768",
    ]
)
TOO_LONG = "moonlight_16b_8gpu+train.tokens_per_microbatch=65536"

WITH_MTP = "r1_671b_256+model.mtp_coef=0.1"
CONFIGS = ["r1_671b_96", "r1_671b_128", "r1_671b_256", "r1_671b_512", LONG_512, WITH_MTP]
CONFIGS += ["moonlight_16b_8gpu", "qwen2.5_7b_8gpu", "gsm8k_1gpu", TOO_LONG]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Folder and output of the worker."""
    folder = tmp_path_factory.mktemp("plans")
    (folder / "configs").symlink_to(ROOT / "configs")
    DeepseekV3Config(vocab_size=512, **DEEPSEEK).save_pretrained(folder / "demo")
    worker = TESTS / "workers" / "plan.py"
    done = python(worker, "demo", "configs/models/deepseek_v3", *CONFIGS, cwd=folder, timeout_s=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder, done.stdout


def printed(output, mark: str) -> list:
    return [json.loads(x) for x in re.findall(rf"^{mark} (.*)$", output[1], re.MULTILINE)]


@pytest.fixture(scope="module")
def plans(output):
    """Config -> what was printed for it, its JSON and its picture."""
    plans = {}
    for i, (item, line) in enumerate(zip(CONFIGS, printed(output, "PLAN"), strict=True)):
        plan = json.loads((output[0] / f"{i}.json").read_text())
        plans[item] = line | {"plan": plan, "picture": (output[0] / f"{i}.svg").read_text()}
    return plans


@pytest.mark.parametrize("item", CONFIGS[:-1])
def test_every_config_fits_with_exact_parameters_in_a_minute_and_4_gb(plans, item):
    made = plans[item]
    assert made["fits"], made["text"]
    assert made["plan"]["parameters"] == PARAMETERS[item.split("_")[0]] + (
        MULTI_TOKEN if item == WITH_MTP else 0
    )
    assert made["seconds"] < 60 and made["gib"] < 4 * 1e9 / 2**30
    assert f"{made['plan']['parameters']:,} parameters" in made["text"]


@pytest.mark.parametrize(
    ("folder", "start"),
    [
        ("deepseek_v3", "r1"),
        ("moonlight_16b_a3b", "moonlight"),
        ("qwen2.5_7b", "qwen2.5"),
        ("qwen2.5_1.5b", "gsm8k"),
    ],
)
def test_parameters_are_those_of_the_published_tensors(folder, start):
    hf = read_hf_config(ROOT / "configs" / "models" / folder)

    def count(shapes):
        return sum(math.prod(s) for name, s in shapes.items() if "e_score" not in name)

    shapes, whole = hf_shapes(hf), hf_shapes(hf, mtp=True)
    assert count(shapes) == PARAMETERS[start]
    own = {n: s for n, s in whole.items() if n not in shapes and shared_name(n) == n}
    assert count(own) == (MULTI_TOKEN if start == "r1" else 0)


def test_multi_token_prediction_costs_a_layer_on_the_last_stage(plans):
    without, plan = plans["r1_671b_256"]["plan"], plans[WITH_MTP]["plan"]
    assert plan["bytes_per_gpu"][:-1] == without["bytes_per_gpu"][:-1]
    last, before = plan["stages"][-1], without["stages"][-1]
    layout = plan["layout"]
    assert last["expert"] - before["expert"] == 256 * 3 * 7168 * 2048 // layout["ep"]
    embedding = 129280 * 7168 // layout["tp"]  # a copy of the first stage's
    assert last["dense"] - before["dense"] > embedding
    update, bare = (p["bytes_per_gpu"][-1]["update"] for p in (plan, without))
    hidden = 32768 * 7168 * 2
    assert update["activations"] - bare["activations"] >= 2 * hidden // layout["tp"]
    assert update["logits head"] - bare["logits head"] == 2 * hidden  # rows and their gradient
    assert (
        plan["bytes_per_gpu"][-1]["rollout"]["generator weights"]
        == (without["bytes_per_gpu"][-1]["rollout"]["generator weights"])
    )


@pytest.mark.parametrize("item", CONFIGS[:-1])
def test_stages_add_up_and_phases_hold_what_they_must(plans, item):
    plan = plans[item]["plan"]
    layout = plan["layout"]
    assert sum(layout["layers"]) == sum(stage["layers"] for stage in plan["stages"])
    for stage, phases in zip(plan["stages"], plan["bytes_per_gpu"], strict=True):
        held = stage["dense"] + stage["expert"]
        assert phases["update"]["weights"] == 2 * held
        assert phases["update"]["gradients"] == 4 * held
        assert phases["rollout"]["gradients"] == 0  # moved to the host meanwhile
    peaks = [max(sum(p.values()) for p in phases.values()) for phases in plan["bytes_per_gpu"]]
    assert plan["peak_bytes"] == max(peaks) <= plan["hardware"]["memory"]


def test_expert_exchange_is_as_large_as_the_layout_says(plans):
    """All-to-all of hidden states: there and back, forward, recomputed and backward, per layer."""
    plan = plans["r1_671b_256"]["plan"]
    layout, rows = plan["layout"], 32768
    sent = {
        (c["name"], c["ranks"]): c["bytes"] for c in plan["collectives_per_microbatch_and_stage"]
    }
    hidden = rows // layout["tp"] * 8 * 7168 * 2  # each row goes to 8 experts, in bfloat16
    moe_layers = 4
    assert sent["alltoall_base", layout["ep"]] == pytest.approx(6 * hidden * moe_layers, rel=0.01)


def test_the_sync_is_that_of_the_trainer(plans):
    """Embedding or head, larger than a bucket: whole, this rank's cut, and all ranks' cuts."""
    plan = plans["r1_671b_256"]["plan"]
    tp, ep = plan["layout"]["tp"], plan["layout"]["ep"]
    embedding = 129280 * 7168 * 2
    for phases in plan["bytes_per_gpu"]:
        assert phases["sync"]["sync bucket"] == embedding * (2 + 1 / tp)
    experts = 58 * 256 * 3 * 7168 * 2048 * 2
    assert plan["sync_bytes_of_a_rank"]["ep"] == experts * (ep - 1) // ep


def test_flops_are_those_of_the_formula(plans):
    """6 FLOPs a parameter and token, 2 more for recomputation; the head is not recomputed."""
    plan = plans["r1_671b_256"]["plan"]
    layout, rows = plan["layout"], 32768
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    experts = 3 * 7168 * 2048 * (8 + 1) + 7168 * 256
    per_token = 4 * (attention + experts)
    # Down projections and the router are whole on each tensor-parallel rank, over its own rows.
    expected = 8 * per_token * rows / layout["tp"]
    products = plan["flops_per_microbatch_and_stage"]["products"]
    assert products == pytest.approx(expected, rel=0.01)


def test_what_does_not_fit_is_said_with_layouts_that_do(plans):
    made = plans[TOO_LONG]
    plan = made["plan"]
    assert not made["fits"] and not plan["fits"]
    (reason,) = [line for line in plan["does_not_fit"] if line.startswith("update")]
    assert "optim.offload=true" in reason and "train.tokens_per_microbatch" in reason
    assert "train.recompute" not in reason  # is set already
    assert reason in " ".join(made["text"].split())
    assert plan["nearest"]
    for found in plan["nearest"]:
        assert found["plan"]["fits"]
        assert found["plan"]["peak_bytes"] <= plan["hardware"]["memory"] < plan["peak_bytes"]


def test_the_search_adds_up_to_what_the_real_model_holds(plans):
    """Its arithmetic gives the built model's parameters of every rank."""
    for item in CONFIGS:
        assert plans[item]["search_is_exact"], item


def test_modelled_figures_say_so(plans):
    for made in plans.values():
        total = sum(made["plan"]["modelled_seconds"].values())
        assert made["plan"]["modelled_step_seconds"] == pytest.approx(total)
        heading, *_ = [line for line in made["text"].splitlines() if "Seconds of a step" in line]
        assert "modelled" in heading
        for line in made["text"].splitlines():
            if "s a step" in line:
                assert line.rstrip().endswith("modelled")


def test_the_picture_is_drawn_to_scale(plans):
    made = plans["r1_671b_256"]
    plan, root = made["plan"], ElementTree.fromstring(made["picture"])
    space = "{http://www.w3.org/2000/svg}"
    bars = [r for r in root.iter(f"{space}rect") if r.find(f"{space}title") is not None]
    heights = {r.find(f"{space}title").text.split(":")[0]: float(r.get("height")) for r in bars}
    phases = max(plan["bytes_per_gpu"], key=lambda p: max(sum(x.values()) for x in p.values()))
    scale = heights["rollout, generator weights"] / phases["rollout"]["generator weights"]
    for phase, parts in phases.items():
        for component, value in parts.items():
            if value:
                assert heights[f"{phase}, {component}"] == pytest.approx(value * scale, abs=0.1)
    assert "planned, not measured" in made["picture"] and "H100" in made["picture"]


def test_memory_of_a_real_update_is_foretold_within_a_tenth(output):
    (figures,) = printed(output, "DEMO")
    assert set(figures["measured"]) == {"weights", "gradients", "optimizer", "activations"}
    for name, measured in figures["measured"].items():
        assert figures["planned"][name] == pytest.approx(measured, rel=0.1), name


def test_the_back_test_in_the_docs_is_what_the_model_gives(output):
    (lines,) = printed(output, "BACK")
    from r1kern.plan.backtest import ROWS, Compared, table

    compared = [Compared(**c) for c in lines]
    assert {c.name for c in compared} == {row.name for row in ROWS}
    for c in compared:
        assert c.error == c.modelled / c.measured - 1
    text = (ROOT / "docs" / "plan.md").read_text()
    assert table(compared) in text
    header = next(x for x in text.splitlines() if x.startswith("| run | figure"))
    assert "published, measured" in header and "ours, modelled" in header


def test_completion_lengths_have_the_mean_that_was_asked_for():
    for mean in (50, 512, 900):
        lengths = Lengths(100, mean, 1024)
        step = 1024 / 4000
        total = sum(survival((i + 0.5) * step, lengths) * step for i in range(4000))
        assert total == pytest.approx(mean, rel=1e-3)


def test_mistakes_are_one_line(capfd, monkeypatch):
    from r1kern import cli

    config = str(ROOT / "configs" / "r1_671b_256.yaml")
    monkeypatch.chdir(ROOT)
    for arguments, words in (
        (["--hardware", "a100"], ["a100", "h200"]),
        (["--world=-8", "--prompt=0"], ["--world -8", "--prompt 0"]),
        (["--response=40000"], ["rollout.max_tokens = 31744"]),
        (["--world", "100"], ["tp*pp=128", "world size 100", "parallel.world_size=256"]),
        (["parallel.tp=3", "parallel.ep=7"], ["tp=3", "(try 2)", "ep=7", "(try 4)"]),
        (["model.path=configs"], ["configs/config.json", "model.path"]),
        (["parallel.layers=[1,2]"], ["16 numbers", "61"]),
    ):
        assert cli.run(["plan", config, *arguments]) == 2
        (error,) = [x for x in capfd.readouterr().err.splitlines() if "r1kern: error" in x]
        assert all(word in error for word in words), error
