"""Gradients and optimizer state out of device memory while the generator works.

Gradients are zeroed before every update, so their memory is only freed.  The optimizer's state
(float32 main weights and moments) moves into page-locked host memory.  Storages are emptied and
refilled in place: Megatron holds many views of them (`param.main_grad`, buckets, shards), and all
stay valid.  FP8 codes of the weights, if any are left, are let go of and made anew when wanted.

The same code moves host memory to host memory on CPU, which is what the tests do; with CUDA it has
not been run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from r1kern.model import fp8


class HostCopies:
    """Moves a trainer's gradients and optimizer state out and back.

    Args:
        ddp: Megatron's DistributedDataParallel, which owns gradients and parameters.
        optimizer: Megatron's distributed optimizer, or a chain of them.
    Attributes:
        is_out: between `out` and `back`; neither an update nor a checkpoint may begin.
    """

    def __init__(self, ddp, optimizer):
        self._ddp, self._optimizer = ddp, optimizer
        self._gradients: list[tuple[torch.Tensor, int]] = []
        self._state: list[torch.UntypedStorage] = []
        self._host: list[torch.Tensor] = []  # kept: page-locking memory takes long
        self.is_out = False

    @torch.no_grad()
    def out(self) -> tuple[int, int]:
        """Empties the storages; nothing happens where they are empty already.

        Returns:
            Bytes of device memory freed, and those of them that are now in host memory.
        """
        if self.is_out:
            return 0, 0
        fp8.forget(self._ddp)
        buffers = self._ddp.buffers + self._ddp.expert_parallel_buffers
        self._gradients = [(b.grad_data, b.grad_data.untyped_storage().nbytes()) for b in buffers]
        self._state = list(self._storages())
        self._copy_out()
        for storage in (*self._state, *(g.untyped_storage() for g, _ in self._gradients)):
            storage.resize_(0)
        self.is_out = True
        host = sum(copy.numel() for copy in self._host)
        return host + sum(size for _, size in self._gradients), host

    @torch.no_grad()
    def back(self) -> None:
        """Fills the storages again: state as it was, gradients zero."""
        if not self.is_out:
            return
        for gradient, size in self._gradients:
            gradient.untyped_storage().resize_(size)
            gradient.zero_()
        for storage, copy in zip(self._state, self._host, strict=True):
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy, non_blocking=True)
        _synchronize()
        self._gradients, self._state, self.is_out = [], [], False

    def _copy_out(self) -> None:
        sizes = [storage.nbytes() for storage in self._state]
        if sizes != [copy.numel() for copy in self._host]:
            pin = torch.cuda.is_available()
            self._host = [torch.empty(n, dtype=torch.uint8, pin_memory=pin) for n in sizes]
        for storage, copy in zip(self._state, self._host, strict=True):
            copy.copy_(_bytes_of(storage), non_blocking=True)
        _synchronize()

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Of the optimizer's state, without those it shares with the model or keeps elsewhere."""
        parameters = list(self._ddp.parameters())
        device = parameters[0].device
        held = [p.main_grad for p in parameters if hasattr(p, "main_grad")]
        seen = {t.untyped_storage().data_ptr() for t in (*parameters, *held)}
        for tensor in _state_tensors(self._optimizer):
            storage = tensor.untyped_storage()
            if tensor.device == device and storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage


def _state_tensors(optimizer) -> Iterable[torch.Tensor]:
    """Main weights and moments of Megatron's optimizer."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue  # a rank without parameters of this kind
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize() -> None:
    """Copies from and to page-locked memory do not wait for themselves."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
