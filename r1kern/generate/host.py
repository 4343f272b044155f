"""What the trainer's process lends vLLM while it is built or runs, and takes back afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping

import numpy
import torch


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables around the import and the building of vLLM.

    Afterwards all are as before: vLLM itself changes LOCAL_WORLD_SIZE, LD_PRELOAD and thread
    settings, and has cached the values of its own (VLLM_*) by then.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only errors from vLLM, unless the user asks for more by its own VLLM_LOGGING_LEVEL."""
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextlib.contextmanager
def random_state(device: str) -> Iterator[None]:
    """Puts the process's random states back: vLLM seeds all of them, and they are the trainer's.

    Args:
        device: "cpu" or "cuda" (then the current device's state too).
    """
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextlib.contextmanager
def thread_control() -> Iterator[None]:
    """Puts `torch.set_num_threads` back, which vLLM makes a function that does nothing on CPU."""
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
