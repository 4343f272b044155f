"""torchrun from within: several processes of this program, ended with one line when they fail."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from r1kern.orphan import LAUNCHER


def launch(arguments: list[str], *, processes: int) -> int:
    """Run `python -m r1kern ARGUMENTS` as one torchrun job on this machine.

    Ctrl-C is passed on; the processes are given two minutes to write their checkpoint.

    Returns:
        0, or the exit code of the process that failed first.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM's notes on memory binding
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=120,
    )
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)("-m", "r1kern", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code  # a signal, as shells count it
    except SignalException as stopped:
        return 128 + stopped.sigval
    finally:
        del os.environ[LAUNCHER]
    return 0
