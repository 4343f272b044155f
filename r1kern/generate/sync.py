"""Weights from the trainer into vLLM's model, audited on both sides.

The sender's side is checked against the names and shapes of the published checkpoint format: a
tensor left out, sent twice, unknown, of the wrong shape, or not finite is an error that names it.
The receiver's side is checked against vLLM's own model: a parameter that its loader never touched
or filled only in part is an error too. vLLM by itself logs a warning, or nothing, and goes on with
what the memory held before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from r1kern.generate import vllm_cpu


class SyncError(RuntimeError):
    """Weights did not arrive whole; the message names the tensors. The engine is not usable."""


@dataclass(frozen=True)
class SyncReport:
    """What one weight update wrote.

    Attributes:
        version: number of optimizer updates the weights had received.
        written: tensors sent and loaded.
        bytes: size of the tensors as sent.
        zero: names of tensors that hold nothing but zeros (not an error: a routing bias starts so).
        seconds: wall clock, gathering by the sender included.
    """

    version: int
    written: int
    bytes: int
    zero: tuple[str, ...]
    seconds: float


class SentAudit:
    """Passes named tensors on while it checks them; `finish` judges the whole.

    Args:
        expected: shape of every tensor that must arrive, by name.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]]):
        self.expected = expected
        self.bytes = 0
        self._largest: dict[str, torch.Tensor] = {}

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator:
        """Yields `tensors` unchanged.

        Raises:
            SyncError: a name that is unknown or comes twice, or a wrong shape.
        """
        for name, tensor in tensors:
            if name not in self.expected:
                raise SyncError(f"{name}: sent, but the model has no such tensor")
            if name in self._largest:
                raise SyncError(f"{name}: sent twice")
            if tuple(tensor.shape) != tuple(self.expected[name]):
                raise SyncError(
                    f"{name}: sent with shape {tuple(tensor.shape)}, "
                    f"the model has {tuple(self.expected[name])}"
                )
            self._largest[name] = _largest(tensor.detach())
            self.bytes += tensor.nbytes
            yield name, tensor

    def finish(self) -> tuple[str, ...]:
        """Names of the all-zero tensors.

        Raises:
            SyncError: tensors that never came, or hold NaN or infinity.
        """
        if missing := [name for name in self.expected if name not in self._largest]:
            raise SyncError(f"never sent: {_list(missing)}")
        # one transfer for all tensors instead of one device synchronisation each
        largest = torch.stack([value.float() for value in self._largest.values()])
        finite, zero = largest.isfinite().tolist(), (largest == 0).tolist()
        if bad := [name for name, ok in zip(self._largest, finite, strict=True) if not ok]:
            raise SyncError(f"NaN or infinity sent in: {_list(bad)}")
        return tuple(name for name, is_zero in zip(self._largest, zero, strict=True) if is_zero)

    def __len__(self) -> int:
        return len(self._largest)


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, NaN when there is one."""
    if tensor.dtype != torch.float8_e4m3fn:
        return torch.linalg.vector_norm(tensor, ord=float("inf"))
    # no reduction takes this type: without the sign its codes are ordered like their values, and
    # the last one is NaN
    return (tensor.view(torch.uint8) & 0x7F).amax().view(torch.float8_e4m3fn)


def receive(
    worker,
    buckets: Iterable[Iterable[tuple[str, torch.Tensor]]],
    expected: Mapping[str, tuple[int, ...]],
    version: int,
) -> SyncReport:
    """Loads the tensors into the model of a vLLM worker, in place.

    These are the steps of vLLM's `reload_weights`, with both audits before the last one: there the
    layers that still wait for elements can be told, and nothing stale has been put back.

    Args:
        worker: vLLM's worker of this process.
        buckets: lists of full tensors (not shards) by published names, best in layer order; when
            the next list is asked for, nothing refers to the tensors of the last.
        expected: shape of every tensor that must come, by name.
        version: number of optimizer updates the weights have received.
    Raises:
        SyncError: something was not sent or not loaded; it is named.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    start = time.perf_counter()
    model = worker.model_runner.get_model()
    audit = SentAudit(expected)
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        if worker.device.type == "cpu":
            vllm_cpu.forget_moe_kernels(model)
        tied = tied_parameters(model)
        initialize_layerwise_reload(model)
        # from here to the end of the load these are the checkpoint's, without what vLLM derives
        parameters = [name for name, _ in model.named_parameters()]
        loaded = model.load_weights(_watch_and_settle(model, audit, buckets))
        zero = audit.finish()
        check_received(model, parameters, loaded, tied)
        finalize_layerwise_reload(model, worker.model_config)
        assert tied_parameters(model) == tied, "vLLM untied a head from its embedding"
        if worker.device.type == "cpu":
            vllm_cpu.pack_tied_heads(model, tied)
    seconds = time.perf_counter() - start
    return SyncReport(version, len(audit), audit.bytes, zero, seconds)


def tied_parameters(model: torch.nn.Module) -> set[str]:
    """Weights of heads that are the embedding's, by their second name."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    first_names = {name for name, _ in model.named_parameters()}
    heads = (n for n, module in model.named_modules() if isinstance(module, ParallelLMHead))
    return {f"{name}.weight" for name in heads} - first_names


def _watch_and_settle(model: torch.nn.Module, audit: SentAudit, buckets) -> Iterator:
    """The tensors of all buckets; after each bucket vLLM holds none of them any more."""
    for bucket in buckets:
        lent = [(name, tensor.detach()) for name, tensor in bucket]
        del bucket
        yield from audit.watch(lent)
        settle(model)
        # vLLM's loops still name the last one, and with it would keep the bucket's memory
        for _, tensor in lent:
            tensor.data = tensor.new_empty(0)


def settle(model: torch.nn.Module) -> None:
    """Copies what waits in unfinished layers into their memory, and forgets the tensors sent.

    vLLM's reload keeps every tensor of a layer until the last has come: all experts of a MoE layer,
    whole, on every rank.  It materialises the layer only then; here this is done at once, with the
    same steps, and vLLM's later pass finds nothing to do but to process the layer.

    Args:
        model: vLLM's model within `load_weights`.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload.layerwise import (
        _get_original_loader,
        get_layerwise_info,
    )
    from vllm.model_executor.model_loader.reload.meta import materialize_layer

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if not info.loaded_weights or is_deferred_attention_layer(layer):
            continue
        materialize_layer(layer, info)
        for name, arguments in info.loaded_weights:
            # vLLM decides by this list whether such a buffer was loaded
            assert name not in info.kernel_non_persistent_buffers, f"{name}: buffer of a checkpoint"
            parameter = getattr(layer, name)
            arguments.arguments["param"] = parameter
            _get_original_loader(parameter)(*arguments.args, **arguments.kwargs)
        info.loaded_weights = []


def check_received(
    model: torch.nn.Module, parameters: list[str], loaded: set[str], tied: set[str]
) -> None:
    """Every element of every parameter of vLLM's model was written since the reload began.

    vLLM counts the elements copied into each layer and processes a layer once it is full; one
    that is not full now would be finished with the memory's old content.

    Args:
        model: vLLM's model between `load_weights` and `finalize_layerwise_reload`.
        parameters: names of the parameters that a checkpoint fills.
        loaded: the names that its loader says it loaded.
        tied: second names of heads' weights, which come under their first.
    Raises:
        SyncError: parameters never or only partly written.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    if missing := [name for name in parameters if name not in loaded | tied]:
        raise SyncError(f"sent, but never loaded by vLLM: {_list(missing)}")
    short = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        # attention holds no weights of its own, only optional quantisation scales
        is_tied = f"{name}.weight" in tied
        if info.can_load() and not (is_tied or is_deferred_attention_layer(layer)):
            size = _loadable_elements(layer)
            if info.load_numel < size:
                short.append(f"{name} ({info.load_numel} of {size} elements)")
    if short:
        raise SyncError(f"sent, but loaded only in part by vLLM: {_list(short)}")


def _loadable_elements(layer: torch.nn.Module) -> int:
    """Elements of the layer's parameters that a checkpoint fills: vocabulary padding is not."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    size = sum(
        get_tensor_load_numel(parameter)
        for name, parameter in layer.named_parameters(recurse=False)
        if name not in SKIP_LOAD_TENSORS
    )
    if isinstance(layer, VocabParallelEmbedding):
        rows = layer.shard_indices.num_elements_padded
        size = size // rows * layer.shard_indices.num_org_elements
    return size


def _list(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
