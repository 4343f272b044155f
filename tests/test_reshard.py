"""A checkpoint of any layout goes on in any other, and in one process."""

from __future__ import annotations

import json
import sys

import pytest
from launch import TESTS, torchrun
from tiny_model import write_tiny_model

from r1kern import distributed

sys.path.insert(0, str(TESTS / "workers"))

WORKER = TESTS / "workers" / "reshard.py"

# Processes, and layouts as TP,EP,PP in the order in which the worker takes them.
SOME = (2, ["1,1,2", "1,2,1", "2,1,1"])
ALL_OF_2 = (2, ["1,2,1", "2,1,1", "1,1,2", "1,1,1"] * 2)
ALL_OF_4 = (4, ["2,2,1", "2,1,2", "1,4,1", "1,2,2", "1,1,1"] * 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, seed=5, num_hidden_layers=4)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SOME, id="some"),
        pytest.param(ALL_OF_2, marks=pytest.mark.full, id="2"),
        pytest.param(ALL_OF_4, marks=pytest.mark.full, id="4"),
    ],
)
def saved(request, model, tmp_path_factory):
    """The folder that the worker has filled, and its layouts."""
    out = tmp_path_factory.mktemp("reshard")
    processes, layouts = request.param
    torchrun(processes, WORKER, model, out, *layouts)
    return out, layouts


def check(found: dict, name: str) -> None:
    assert found["step"] == 2
    assert found["version"] == 4
    assert found["loaded"] == 0.0, name
    assert found["metrics"] < 1e-6, name
    assert found["after"] < 1e-6, name


def test_a_layout_goes_on_from_the_others(saved):
    out, layouts = saved
    result = json.loads((out / "result.json").read_text())
    if layouts == SOME[1]:
        assert result.keys() == {"1,1,2 -> 1,2,1", "1,1,2 -> 2,1,1", "1,2,1 -> 2,1,1"}
    else:
        assert len(result) == len(set(layouts)) ** 2
    for name, found in result.items():
        check(found, name)
        there, here = name.split(" -> ")
        if there == here:
            assert found["metrics"] == found["after"] == 0.0, name


def test_one_process_goes_on_from_every_layout(saved, model):
    import reshard

    out, layouts = saved
    policy = reshard.policy_of(distributed.start(seed=0), str(model))
    for layout in sorted(set(layouts)):
        check(reshard.compare(policy, out, layout), layout)
    distributed.shutdown()
