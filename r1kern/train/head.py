"""What a loss on a packed micro-batch is given of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from r1kern import ops
from r1kern.types import PackedBatch


@dataclass(frozen=True)
class Head:
    """What the head's ops take: everything between the last hidden states and a log-prob.

    Attributes:
        hidden: [N, H], rows that predict the N completion tokens of a micro-batch.
        weight: [V / tp, H], this rank's rows of the language-model head.
        targets: int64 [N].
        options: temperature and tp_group.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    options: dict

    def logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [N]."""
        return ops.linear_logprob(self.hidden, self.weight, self.targets, **self.options)


@dataclass(frozen=True)
class ValueHead:
    """What a loss is given of a model with a scalar head.

    Attributes:
        rows: float32 [N], the value of each row that `PackedBatch.rows` names: of the prompt and
            the completion tokens before the one that the row predicts.
    """

    rows: torch.Tensor

    def values(self) -> torch.Tensor:
        """[N], differentiable."""
        return self.rows


Loss = Callable[[Head, PackedBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
ValueLoss = Callable[[ValueHead, PackedBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
