"""AdamW and its learning-rate schedule, by Megatron's distributed optimizer."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from r1kern.config import Optim
from r1kern.train import adam
from r1kern.train.host_optimizer import get_host_optimizer


def build_optimizer(
    optim: Optim, dtype: torch.dtype, ddp: DistributedDataParallel
) -> MegatronOptimizer:
    """Sharded over the data-parallel ranks; on the device, or by `optim.offload` on the host.

    Args:
        dtype: of the parameters; master weights and moments are float32.
        ddp: the model with its gradient buffers.
    """
    adam.install()
    build = get_host_optimizer if optim.offload else get_megatron_optimizer
    return build(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
    )


def ensure_state(optimizer: MegatronOptimizer) -> None:
    """Zero moments where no update has made any: a checkpoint of untouched weights needs them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue  # a rank without parameters of this kind
        if not isinstance(part.optimizer, adam.Adam):  # Transformer Engine's
            part.init_state_fn(part.optimizer, part.config)
            continue
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                if param.numel() and not part.optimizer.state[param]:
                    part.optimizer.initialize_state(param)


def build_scheduler(
    optim: Optim, optimizer: MegatronOptimizer, total_updates: int
) -> OptimizerParamScheduler:
    """Warm-up from 0 and then `optim.schedule` over the optimizer steps of the whole run."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(total_updates, optim.warmup_steps + 1),
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
