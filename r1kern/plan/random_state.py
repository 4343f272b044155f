"""Megatron-core without its random states, for passes on fake tensors: nothing is drawn there.

Megatron compares the host's random states around each region of its tracker and saves them for
recomputation; a fake tensor has no values to compare or save.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

from r1kern import megatron_cpu


@contextmanager
def without_random_states():
    """Within the block Megatron neither reads nor sets a random state.

    Raises:
        RuntimeError: Megatron-core's version or names have changed.
    """
    import megatron.core
    import megatron.core.tensor_parallel.random as random

    megatron_cpu.check_guard(megatron.core.__version__)
    replaced = {
        "_get_all_rng_states": lambda: (),
        "_set_all_rng_states": lambda *states: None,
        "_fork_rng": nullcontext,
    }
    tracker = random.CudaRNGStatesTracker
    missing = [name for name in replaced if not hasattr(random, name)]
    if missing or not hasattr(tracker, "fork"):
        raise RuntimeError(
            f"megatron.core.tensor_parallel.random has changed ({missing or 'fork'}): "
            f"r1kern/plan/random_state.py must be brought up to date"
        )
    original, fork = {name: getattr(random, name) for name in replaced}, tracker.fork
    vars(random).update(replaced)
    tracker.fork = lambda self, *args, **kwargs: nullcontext()
    try:
        yield
    finally:
        vars(random).update(original)
        tracker.fork = fork
