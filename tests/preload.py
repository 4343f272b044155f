"""What every rank imports, imported once: `forked.py` forks the ranks from the process that has.

Importing torch, Megatron-core and vLLM takes ten seconds and more of a core, in every process.
"""

import gc
import importlib
import os

# This process prints nothing but what its libraries warn of; each that it forks has its own files.
_nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(_nowhere, 1)
os.dup2(_nowhere, 2)

from r1kern import megatron_cpu  # noqa: E402

MODULES = ["r1kern.cli", "r1kern.generate", "r1kern.train.grpo", "r1kern.train.ppo"]
MODULES += ["r1kern.train.sft", "r1kern.train.checkpoint", "vllm.entrypoints.llm"]

megatron_cpu.install()  # as `distributed.start` does, before anything else of Megatron is imported
for name in MODULES:
    importlib.import_module(name)

# Nothing that is here now dies in a child: its collector need not look at it, nor copy its pages.
gc.collect()
gc.freeze()
