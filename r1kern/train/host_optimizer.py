"""AdamW in host memory, for models whose optimizer does not fit beside them on the GPU.

What lives where, for each parameter of this rank's data-parallel shard: 12 bytes in host memory
(master weight and two moments in float32); on the device the weight itself and its float32 gradient
stay.  What moves in one update: 4 bytes of gradient to the host, and the new weight back in its own
dtype (bfloat16: 2 bytes), one parameter at a time in pageable memory.  Gradient norm and clipping
happen on the device before.

Megatron's own HybridDeviceOptimizer is not used: it offloads CUDA tensors only, so that nothing of
it runs without a GPU, and steps torch's AdamW, whose state another resume could not read.
"""

from __future__ import annotations

import dataclasses

import megatron.core.optimizer as megatron
import megatron.core.optimizer.distrib_optimizer as distributed
import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from r1kern.train.adam import Adam

STATES = ("master_param", "exp_avg", "exp_avg_sq")

# Megatron's switch to an optimizer that keeps the master weights; derived from options of which
# every combination demands Transformer Engine or Megatron's own offload.
SWITCH = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"


class HostAdam(Adam):
    """`Adam` whose master weights, moments and arithmetic are on the CPU, float32.

    Speaks the interface that Megatron calls a precision-aware optimizer (Transformer Engine's
    FusedAdam with master weights): parameters are shards of the model's weights in their own dtype,
    gradients come in `decoupled_grad`, the optimizer keeps the master weights and writes the
    model's.  Updates are bit-equal to `Adam` run on the CPU.
    """

    def initialize_state(self, param):
        """Master weight from the model's, zero moments."""
        host = param.detach().to("cpu", torch.float32, copy=True)
        self.state[param] = {
            "master_param": host,
            "exp_avg": torch.zeros_like(host),
            "exp_avg_sq": torch.zeros_like(host),
        }

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", None)
                if grad is None or not param.numel():
                    continue
                master, mean, square = (self.state[param][name] for name in STATES)
                self._update(group, [master], [grad.to("cpu", torch.float32)], [mean], [square])
                param.copy_(master)

    def load_state_dict(self, state_dict):
        """Options of the groups only; Megatron brings the states by `set_scaled_state`.

        torch's own would move them to the parameters' device and dtype.
        """
        for group, options in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {name: value for name, value in options.items() if name != "params"}
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param)

    def get_unscaled_state(self, param, name: str) -> torch.Tensor:
        return self.state[param][name]

    def set_scaled_state(self, param, name: str, value: torch.Tensor) -> None:
        self.state[param][name].copy_(value)


def get_host_optimizer(config: OptimizerConfig, model_chunks: list) -> MegatronOptimizer:
    """Megatron's `get_megatron_optimizer` over `HostAdam` (behind `DistributedOptimizer`).

    Its checkpoints have the entries of the optimizer on the device: either resumes the other's.

    Raises:
        RuntimeError: Megatron's name for the switch has changed.
    """
    config = dataclasses.replace(config)
    if not hasattr(config, SWITCH):
        raise RuntimeError(
            f"megatron-core's OptimizerConfig.{SWITCH} is gone: r1kern/train/host_optimizer.py "
            f"must be brought up to date with the installed megatron-core"
        )
    setattr(config, SWITCH, True)
    device_adam = megatron.Adam, distributed.Adam
    megatron.Adam = distributed.Adam = HostAdam
    try:
        return get_megatron_optimizer(config, model_chunks)
    finally:
        megatron.Adam, distributed.Adam = device_adam
