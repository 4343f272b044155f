"""AdamW with Transformer Engine's state layout, for machines that have neither it nor Apex.

Megatron-core falls back on `torch.optim.AdamW` there, which keeps a `step` for every parameter: its
distributed optimizer can then neither save nor load a checkpoint.  Here `step` is kept in the
parameter group and the state of a parameter is `exp_avg` and `exp_avg_sq`, as on GPUs.
"""

from __future__ import annotations

import torch


class Adam(torch.optim.Optimizer):
    """Decoupled weight decay Adam (arXiv 1711.05101), states in float32."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, **unknown):
        assert adam_w_mode and not unknown, f"not supported: {unknown or 'L2 regularisation'}"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def initialize_state(self, param):
        """Zero moments, called by Megatron before it loads a checkpoint."""
        self.state[param] = {
            "exp_avg": torch.zeros_like(param, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32),
        }

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for param in params:
                if not self.state[param]:
                    self.initialize_state(param)
            if params:
                grads = [p.grad.float() for p in params]
                means = [self.state[p]["exp_avg"] for p in params]
                squares = [self.state[p]["exp_avg_sq"] for p in params]
                self._update(group, params, grads, means, squares)

    @staticmethod
    def _update(group, params, grads, means, squares):
        beta1, beta2 = group["betas"]
        step, lr = group["step"], group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_addcdiv_(params, means, scale, -lr / (1 - beta1**step))


def install() -> None:
    """Give Megatron this class where it would fall back on torch's.

    Raises:
        RuntimeError: Megatron's names for its choice have changed.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    names = {
        optimizer: ("Adam", "USING_PYTORCH_OPTIMIZER"),
        distributed: ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"),
    }
    for module, symbols in names.items():
        for symbol in symbols:
            if not hasattr(module, symbol):
                raise RuntimeError(
                    f"{module.__name__}.{symbol} is gone: r1kern/train/adam.py must be brought up "
                    f"to date with the installed megatron-core"
                )
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distributed.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_TE_OPTIMIZER = True
