"""Fixtures of several test files."""

import pytest
import torch
from hypothesis import settings

# A test is not timed: on a busy machine any example may take long.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def poisoned():
    """Every uninitialised allocation is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
