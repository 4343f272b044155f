"""Megatron-core on CPU: everything its official options do not reach, in one guarded place.

Megatron-core 0.16.1 names `torch.cuda`, `device="cuda"` and CUDA tensor types literally.  Its
loaded modules are given a look-alike of the global name `torch` in which those mean the CPU; torch
itself keeps its meaning for everybody else in the process (vLLM, transformers, the user).  Called
once by `distributed.start` on a machine without a GPU; it refuses to run when Megatron's version or
a symbol it relies on has changed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types

import torch
import torch.distributed as dist

SUPPORTED = "0.16.1"

# What is replaced, and why it is needed on CPU.
REPLACED = (
    ("megatron.core.jit", "jit_fuser"),  # would torch.compile small functions
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"),  # CUDA generator
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"),
)

# Modules that must be loaded before the look-alike is handed out, late imports included.
MODULES = (
    "models.gpt",
    "models.gpt.gpt_layer_specs",
    "distributed",
    "optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "pipeline_parallel",
    "pipeline_parallel.schedules",
    "pipeline_parallel.combined_1f1b",
    "transformer.moe.experts",
    "transformer.moe.token_dispatcher",
    "dist_checkpointing",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.fully_parallel",
)

FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "empty_like")


class _Inert:
    """Stands for a CUDA stream or event: every method returns None."""

    def __init__(self, *args, **kwargs):
        pass

    def __eq__(self, other):
        return isinstance(other, _Inert)

    __hash__ = None

    def __getattr__(self, name):
        return lambda *args, **kwargs: _Inert() if name == "record_event" else None


def _cuda_module() -> types.ModuleType:
    cpu = torch.device("cpu")
    cuda = types.ModuleType("torch.cuda")
    cuda.Stream = cuda.Event = _Inert
    cuda.FloatTensor, cuda.HalfTensor = torch.FloatTensor, torch.HalfTensor
    cuda.BFloat16Tensor = torch.BFloat16Tensor
    cuda.current_device = lambda: cpu
    cuda.current_stream = cuda.default_stream = lambda *args: _Inert()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = cuda.empty_cache = lambda *args: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.is_available = lambda: False
    cuda.device_count = lambda: 1
    cuda.__getattr__ = lambda name: getattr(torch.cuda, name)
    return cuda


def _on_cpu(factory):
    def make(*args, device=None, pin_memory=False, **kwargs):
        if device is not None and str(device).startswith("cuda"):
            device = torch.device("cpu")
        return factory(*args, device=device, **kwargs)

    return make


def _as_list(sizes):
    return sizes.tolist() if hasattr(sizes, "tolist") else sizes


def _distributed_module() -> types.ModuleType:
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        # gloo takes split sizes as lists only; the token dispatcher passes arrays.
        sizes = _as_list(output_split_sizes), _as_list(input_split_sizes)
        return dist.all_to_all_single(output, input, *sizes, **kwargs)

    look_alike = types.ModuleType("torch.distributed")
    look_alike.__dict__.update(dist.__dict__)
    look_alike.all_to_all_single = all_to_all_single
    look_alike.__getattr__ = lambda name: getattr(dist, name)
    return look_alike


def _torch_module() -> types.ModuleType:
    look_alike = types.ModuleType("torch")
    look_alike.__dict__.update(torch.__dict__)
    look_alike.cuda = _cuda_module()
    look_alike.distributed = _distributed_module()
    for name in FACTORIES:
        setattr(look_alike, name, _on_cpu(getattr(torch, name)))
    look_alike.__getattr__ = lambda name: getattr(torch, name)
    return look_alike


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


def _patch_tensor_methods() -> None:
    """`Tensor.type()` and `Tensor.cuda()`: strings and moves the look-alike cannot reach."""
    tensor_type, tensor_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self, *args, **kwargs):
        name = tensor_type(self, *args, **kwargs)
        if isinstance(name, str) and _called_by_megatron():
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    def cuda(self, *args, **kwargs):
        return self if _called_by_megatron() else tensor_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = type_, cuda


def check_guard(version: str) -> None:
    """Raise when Megatron-core is not the version, or lacks a symbol, these patches were made for.

    Raises:
        RuntimeError: names the version or the symbol and what to do.
    """
    if version != SUPPORTED:
        raise RuntimeError(
            f"megatron-core {version} is installed, r1kern's CPU support is made for {SUPPORTED}: "
            f"pip install megatron-core=={SUPPORTED}"
        )
    for module, symbol in REPLACED:
        if not hasattr(importlib.import_module(module), symbol):
            raise RuntimeError(
                f"{module}.{symbol} is gone: r1kern/megatron_cpu.py must be brought up to date "
                f"with the installed megatron-core"
            )


@contextlib.contextmanager
def _without_compile():
    """Within the block `torch.compile` gives a function back as it is.

    Compiling takes seconds of a C++ compiler for a few lines each, and fails where there is none.
    """
    compiler = torch.compile
    torch.compile = lambda function: function
    try:
        yield
    finally:
        torch.compile = compiler


_installed = False


def install() -> None:
    """Make Megatron-core run on CPU in this process; idempotent.

    Raises:
        RuntimeError: Megatron-core changed (see `check_guard`), or is loaded already by somebody
            else, so that the fusion switch would come too late.
    """
    global _installed
    if _installed:
        return
    if "megatron.core.transformer.transformer_layer" in sys.modules:
        raise RuntimeError(
            "megatron.core is loaded already: call r1kern.distributed.start() before importing it "
            "or anything of r1kern.model and r1kern.train"
        )
    with _without_compile():  # Megatron's modules decorate with it while they are imported
        import megatron.core
        import megatron.core.jit as jit

    jit.jit_fuser = lambda function: function
    check_guard(megatron.core.__version__)
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in MODULES:
        importlib.import_module("megatron.core." + name)

    look_alike = _torch_module()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = look_alike
    _patch_tensor_methods()
    _installed = True
