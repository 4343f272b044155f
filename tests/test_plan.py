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
IN_FP8 = "r1_671b_256+model.precision=fp8_blockwise+model.fp8_linears=true"
CONFIGS = ["r1_671b_96", "r1_671b_128", "r1_671b_256", "r1_671b_512", LONG_512, WITH_MTP, IN_FP8]
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


@pytest.mark.parametrize("in_fp8", [False, True])
def test_memory_of_a_real_update_is_foretold_within_a_tenth(output, in_fp8):
    figures = printed(output, "DEMO")[in_fp8]
    parts = {"weights", "gradients", "optimizer", "activations", "FP8 codes"}
    assert set(figures["measured"]) == parts
    assert (figures["measured"]["FP8 codes"] > 0) == in_fp8
    for name, measured in figures["measured"].items():
        assert figures["planned"][name] == pytest.approx(measured, rel=0.1), name


# A layer of DeepSeek-V3, TP2 x EP8: T tokens, half of them on a rank, R rows at 32 experts, which
# FP8 pads for the weights' gradients.
T, H, WIDTH, LOCAL = 2048, 7168, 2048, 32
R = T // 2 * 8
PADDED = R + LOCAL * 127 // 128 * 128


def columns(*sizes: int) -> int:
    """Bytes of FP8 codes [K, P] and of a float32 scale for each 128 of a column."""
    return sum(size + size // 128 * 4 for size in sizes)


def test_what_fp8_keeps_for_the_backward_is_as_counted_by_hand(output):
    (costs,) = printed(output, "LAYER")
    bf16, experts, linears = (costs[name]["saved"] for name in ("bf16", "experts", "linears"))
    # fc1's product and the probabilities stay; silu(gate), up, their product and fc2's input go.
    gone = 2 * R * (H + 4 * WIDTH)
    kept = columns(PADDED * H, PADDED * WIDTH) + 8 * (LOCAL + 1)
    assert bf16 - experts == gone - kept
    # Both down projections have one input; Megatron keeps this rank's rows, FP8 gathered ones.
    own, whole = H + 1536 + 512 + H, 128 * 128 // 2 + WIDTH // 2
    gone = 2 * (own * T // 2 + whole * T)
    kept = columns(2 * H * T // 2, (1536 + 512 + H + whole) * T) + 7 * 8 * 2
    assert experts - linears == gone - kept


def test_codes_of_weights_are_counted_once(output):
    (costs,) = printed(output, "LAYER")
    blocks = 2 + 4 / 128**2  # two codes of each weight and a scale
    assert costs["bf16"]["codes"] == 0
    assert costs["experts"]["codes"] == blocks * LOCAL * 3 * H * WIDTH
    for name in ("experts", "linears"):  # nothing as large as they are beside activations
        assert costs[name]["working"] - costs["bf16"]["working"] < costs[name]["codes"] / 4
        assert costs[name]["forward_peak"] <= costs["bf16"]["forward_peak"]


def test_products_in_fp8_are_those_in_bfloat16_without_padding(output):
    (costs,) = printed(output, "LAYER")
    products = 2 * R * 3 * H * WIDTH
    for way, times in (("forward", 1), ("backward", 2)):
        bf16, experts, linears = (costs[name][way] for name in ("bf16", "experts", "linears"))
        assert bf16["fp8_flops"] == 0
        assert experts["fp8_flops"] == times * products
        assert experts["flops"] == bf16["flops"] - times * products
        # On a machine with a GPU the 576 rows of a down projection are padded to 640.
        total = linears["flops"] + linears["fp8_flops"]
        assert total == pytest.approx(bf16["flops"], rel=1e-3)
        router = times * 2 * T // 2 * H * 256
        assert linears["flops"] == router
        assert experts["moved"] < bf16["moved"] and experts["kernels"] < bf16["kernels"]


def test_an_update_in_fp8_is_faster_and_not_more_than_twice(plans):
    plan, plain = plans[IN_FP8]["plan"], plans["r1_671b_256"]["plan"]
    for phase in ("update", "reference log-probs"):
        before, after = (p["modelled_seconds"][phase] for p in (plain, plan))
        assert before / 2 < after < 0.9 * before, phase
    for phase in ("rollout", "sync", "sleep and wake"):
        assert plan["modelled_seconds"][phase] == plain["modelled_seconds"][phase]
    work, before = (p["flops_per_microbatch_and_stage"] for p in (plan, plain))
    assert before["fp8_products"] == 0
    assert sum(work.values()) == pytest.approx(sum(before.values()), rel=1e-3)
    assert "matrix products in FP8" in plans[IN_FP8]["text"]
    assert "FP8" not in plans["r1_671b_256"]["text"]
    stage, phases = plan["stages"][1], plan["bytes_per_gpu"][1]
    parameters = stage["dense"] + stage["expert"]
    assert phases["update"]["FP8 codes"] == pytest.approx(2 * parameters, rel=0.01)
    assert "FP8 codes" not in phases["rollout"]


def test_the_figures_of_fp8_in_the_docs_are_the_plan_s(plans):
    text = (ROOT / "docs" / "plan.md").read_text()
    both = [plans[item]["plan"] for item in ("r1_671b_256", IN_FP8)]
    updates = [max((p["update"] for p in plan["bytes_per_gpu"]), key=sum_all) for plan in both]
    rows = {
        "GiB of a GPU in an update, planned": [sum_all(u) / 2**30 for u in updates],
        "of that, codes of the weights": [u["FP8 codes"] / 2**30 for u in updates],
        "s of an update, modelled": [p["modelled_seconds"]["update"] for p in both],
        "s of reference log-probs, modelled": [
            p["modelled_seconds"]["reference log-probs"] for p in both
        ],
    }
    for name, (bf16, fp8) in rows.items():
        assert f"| {name} | {bf16:.1f} | {fp8:.1f} |" in text, name


def sum_all(parts: dict) -> float:
    return sum(parts.values())


def test_the_search_takes_widths_that_fp8_can_be_cut_into(plans):
    """Moonlight's shared experts, 2816 wide, are no whole blocks on four ranks."""
    assert plans["moonlight_16b_8gpu"]["fp8_widths"] == [1, 2]
    assert plans["r1_671b_256"]["fp8_widths"] == [1, 2, 4, 8]


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
