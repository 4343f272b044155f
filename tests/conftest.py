"""Fixtures of several test files."""

import gc
import sys

import pytest
import torch
from hypothesis import settings

# A test is not timed: on a busy machine any example may take long.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


# What takes longest comes first, so that no process works on alone at the end.
LONG = """
    run generate eval math_reward hf_files checkpoint invariance layouts hopper_host pipeline sync
    readme package reward_model plan dense_run harness cli launch bench objective_triton
    host_optimizer
"""


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONG.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def frozen_imports():
    """Collections, of which a checkpoint or an engine asks for some, skip what was imported.

    Else each takes up to a second: half the time of `test_checkpoint`.
    """
    global modules_frozen
    if len(sys.modules) > modules_frozen:
        gc.collect()
        gc.freeze()
        modules_frozen = len(sys.modules)


modules_frozen = 0


@pytest.fixture
def poisoned():
    """Every uninitialised allocation is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
