"""Loss and gradient norm do not depend on how the work is divided.

The same global batch, ragged, through the GRPO loss and the policy's update, for every DP x TP
(with sequence parallelism) x EP x PP x micro-batch split.  One rank with one micro-batch is the
truth.  The second update has old log-probs that differ from the present ones and a KL to the
reference model; `skewed` routes nearly all tokens to the experts of one group.

The last test takes the remedies against Megatron-core's wrong gradients away, one by one, and sees
the comparison fail.
"""

from __future__ import annotations

import json

import pytest
from launch import TESTS, torchrun
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from r1kern import distributed

WORKER = TESTS / "workers" / "invariance.py"
MODELS = ["even", "skewed"]
WHOLE = 4000  # a budget that the whole batch fits
CUT = 90

TWO = ["1,1,1", "1,2,1", "2,1,1", "2,2,1", "1,1,2"]
FOUR = [
    *(f"{tp},{ep},1" for tp in (1, 2, 4) for ep in (1, 2, 4)),
    *(f"{tp},{ep},2" for tp in (1, 2) for ep in (1, 2)),
    "1,1,4",
]
TELLING = [f"skewed:2,2,2,{CUT}", f"even:2,4,1,{WHOLE}"]
FAULTS = ["column_parallel_down", "allreduce", "tensor_model_parallel"]

# Relative, float32: rounding of sums that are cut otherwise.
SAME = 1e-6


def every(layouts, budgets=(WHOLE, CUT)):
    return [f"{m}:{layout},{b}" for layout in layouts for m in MODELS for b in budgets]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The two models, alike but for the router's bias."""
    folder = tmp_path_factory.mktemp("invariance")
    for name in MODELS:
        write_tiny_model(folder / name, seed=3, num_hidden_layers=4)
    file = folder / "skewed" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[:5] += 2.0
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def truth(folder):
    """One rank, in this process."""
    world = distributed.start(seed=0)
    from workers.invariance import run

    found = {f"{m}:1,1,1,{WHOLE}": run(world, folder / m, WHOLE) for m in MODELS}
    found[f"even:1,1,1,{CUT}"] = run(world, folder / "even", CUT)
    distributed.shutdown()
    return found


def measure(folder, processes, cases):
    out = folder / f"{processes}.json"
    torchrun(processes, WORKER, folder, out, *cases)
    return json.loads(out.read_text())


def differences(found, truth):
    """Largest relative difference of a case's losses and gradient norms from the truth's."""
    worst = {}
    for case, updates in found.items():
        expected = truth[f"{case.split(':')[0]}:1,1,1,{WHOLE}"]
        worst[case] = max(
            abs(mine[name] / theirs[name] - 1)
            for mine, theirs in zip(updates, expected, strict=True)
            for name in ("loss", "grad_norm")
        )
    return worst


def check(found, truth):
    wrong = {case: d for case, d in differences(found, truth).items() if not d < SAME}
    assert not wrong, wrong


@pytest.fixture(scope="module")
def on_two(folder):
    faulty = [f"even:2,1,1,{WHOLE}:{fault}" for fault in FAULTS]
    return measure(folder, 2, [*every(TWO, [CUT]), *faulty])


def test_one_rank(truth):
    """Micro-batches of one rank; and every term of the loss is at work."""
    assert truth[f"even:1,1,1,{WHOLE}"][0]["microbatches"] == 1
    assert truth[f"even:1,1,1,{CUT}"][0]["microbatches"] == 3
    check(truth, truth)
    for plain, with_reference in truth.values():
        assert min(abs(plain["loss"]), plain["grad_norm"]) > 0.1
        assert with_reference["kl"] > 0.01
        assert with_reference["clip_fraction"] > 0.1


def test_two_ranks_with_every_layout(on_two, truth):
    check({case: r for case, r in on_two.items() if case.count(":") == 1}, truth)


def test_four_ranks(folder, truth):
    check(measure(folder, 4, TELLING), truth)


@pytest.mark.full
def test_two_ranks_with_whole_micro_batches(folder, truth):
    check(measure(folder, 2, every(TWO, [WHOLE])), truth)


@pytest.mark.full
def test_four_ranks_with_every_layout(folder, truth):
    check(measure(folder, 4, every(FOUR)), truth)


@pytest.mark.parametrize("fault", FAULTS)
def test_without_its_remedy_a_fault_shows(fault, on_two, truth):
    case = f"even:2,1,1,{WHOLE}:{fault}"
    assert differences({case: on_two[case]}, truth)[case] > 100 * SAME
