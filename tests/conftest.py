"""Fixtures of several test files."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """Every uninitialised allocation is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
