"""What a piece of the model costs, by watching its operators on fake (or real) tensors.

Everything but the attention's FLOPs is read off the operators that really run; attention is counted
by formula, because PyTorch's FLOP counter leaves its CPU kernel out.
"""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from r1kern.kernels.fp8_reference import padded_rows

ATTENTION = "_scaled_dot_product"
FREE = {
    "view",
    "reshape",
    "detach",
    "t",
    "transpose",
    "expand",
    "slice",
    "split",
    "select",
    "alias",
    "empty",
    "empty_like",
    "new_empty",
}


@dataclass
class Work:
    """What one pass did.

    Attributes:
        flops: of matrix products in the model's dtype.
        fp8_flops: of those in FP8.
        attention_flops: of attention's products, masked half left out.
        moved: bytes read and written by everything else.
        kernels: operators that launch something.
        traffic: bytes entering each collective, by (name, size of its group, calls counted apart).
        calls: number of those collectives.
    """

    flops: float = 0.0
    fp8_flops: float = 0.0
    attention_flops: float = 0.0
    moved: float = 0.0
    kernels: int = 0
    traffic: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.fp8_flops + other.fp8_flops,
            self.attention_flops + other.attention_flops,
            self.moved + other.moved,
            self.kernels + other.kernels,
            self.traffic + other.traffic,
            self.calls + other.calls,
        )

    def __mul__(self, times: int) -> Work:
        scaled = [Counter({k: v * times for k, v in c.items()}) for c in (self.traffic, self.calls)]
        numbers = (self.flops, self.fp8_flops, self.attention_flops, self.moved, self.kernels)
        return Work(*(n * times for n in numbers), *scaled)

    @property
    def all_flops(self) -> float:
        return self.flops + self.fp8_flops + self.attention_flops


class Trace(TorchDispatchMode):
    """Counts work and live bytes of new tensors while it is entered.

    Attributes:
        work: done so far; take it and set a fresh one to tell passes apart.
        live, peak: bytes of tensors made within the trace, now and at most.
    """

    def __init__(self):
        super().__init__()
        self.work, self.live, self.peak = Work(), 0, 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:  # else a view, perhaps of a weight
                self._register(storage)
        self._count(function, args, kwargs, out, inputs, outputs)
        return out

    def _register(self, storage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._dead, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _dead(self, key: int, size: int, _) -> None:
        del self._storages[key]
        self.live -= size

    def _count(self, function, args, kwargs, out, inputs, outputs) -> None:
        work, name = self.work, function._schema.name.split("::")[1]
        if function.namespace == "c10d":
            group = _group_size(args)
            size = max((t.nbytes for t in inputs), default=0)
            if group > 1 and size:
                work.traffic[name.strip("_"), group] += size
                work.calls[name.strip("_"), group] += 1
            return
        if name in FREE or not (outputs or name in FP8_FLOPS):
            return
        work.kernels += 1
        if name in FP8_FLOPS:
            work.fp8_flops += FP8_FLOPS[name](*args)
        elif ATTENTION in name:
            work.attention_flops += _attention_flops(name, args)
        elif function._overloadpacket in flop_registry:
            work.flops += flop_registry[function._overloadpacket](*args, **kwargs, out_val=out)
        elif not _is_view(inputs, outputs):
            work.moved += sum(t.nbytes for t in (*inputs, *outputs))


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps for the backward, weights left out.

    Works on real and on fake tensors.

    Args:
        model: its parameters and buffers are not counted.
    """

    def __init__(self, model: torch.nn.Module):
        held = [*model.parameters(), *model.buffers()]
        self._own = {t.untyped_storage()._cdata for t in held}
        self._saved: dict[int, weakref.ref] = {}

    @contextmanager
    def watch(self):
        """Counts what is saved within the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._saved[storage._cdata] = weakref.ref(storage)
        return tensor

    def total(self) -> int:
        """Bytes held at this moment (call it between forward and backward)."""
        alive = (saved() for saved in self._saved.values())
        return sum(storage.nbytes() for storage in alive if storage is not None)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_view(inputs, outputs) -> bool:
    own = {t.untyped_storage()._cdata for t in inputs}
    return len(outputs) == 1 and outputs[0].untyped_storage()._cdata in own and len(inputs) == 1


def _group_size(args) -> int:
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject):
            try:
                return torch.distributed.ProcessGroup.unbox(leaf).size()
            except RuntimeError:
                continue
    raise AssertionError("a collective without a process group")


def _attention_flops(name: str, args) -> float:
    """Two products forward, five backward (with the scores again), the causal half of each."""
    q, k, v = args[1:4] if "backward" in name else args[:3]
    batch, heads, rows, width = q.shape
    product = batch * heads * rows * k.shape[2]  # 2 FLOPs, half of them masked
    if "backward" in name:
        return product * (3 * width + 2 * v.shape[3])
    return product * (width + v.shape[3])


def _fp8_gemm_flops(a, a_scales, b, *_) -> float:
    _, N, K = b.shape
    return 2 * len(a) * N * K


def _fp8_wgrad_flops(a, a_scales, b, b_scales, offsets, grads) -> float:
    """Of the rows, to within a tile of 128; the padding between the experts does not count."""
    rows = a.shape[1] - padded_rows(0, len(grads))
    return 2 * rows * len(a) * len(b)


# Arguments of `kernels.fp8_gemm`; the second has no output, it adds to gradients.
FP8_FLOPS = {"fp8_grouped_gemm": _fp8_gemm_flops, "fp8_grouped_wgrad": _fp8_wgrad_flops}
