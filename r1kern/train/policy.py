"""The trained model: log-probabilities, updates, its reference copy, its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)

from r1kern.config import Experts, Model, Optim, Parallel, RecomputedPart
from r1kern.distributed import World
from r1kern.hf.dtype import ExportDtype
from r1kern.hf.names import hf_shapes, hf_splits, shared_name
from r1kern.hf.reader import HFReader
from r1kern.hf.scalar_head import describe_scalar_head
from r1kern.hf.writer import write_model_folder
from r1kern.model import balance, fp8
from r1kern.model.carry import export_whole
from r1kern.model.export import Named, export_buckets, export_weights
from r1kern.model.local import local_tensors
from r1kern.model.mtp import mtp_loss
from r1kern.model.replay import Choices, agreement, playing, recording
from r1kern.model.sync_plan import SyncPlan, plan_sync
from r1kern.train.assembly import assemble
from r1kern.train.head import Head, Loss, ValueHead, ValueLoss
from r1kern.train.host_copies import HostCopies
from r1kern.train.optimizer import build_optimizer, build_scheduler
from r1kern.train.passes import from_last_stage, run_batches, score_batches
from r1kern.types import PackedBatch


class Policy:
    """One model under Megatron's parallelism with its optimizer.

    Args:
        model: folder, initialisation and dtype.
        parallel: sizes of the groups that `world` was started with.
        optim: AdamW and its schedule.
        world: from `distributed.start`.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        experts: their balance.
        recompute: parts computed again in the backward.
        scalar_head: a reward or value model: one value a token (`values`) and a loss on a
            `ValueHead` instead of log-probabilities and a loss on a `Head`; see `assemble`.

    Raises:
        UserError: the model cannot be laid out so (all reasons at once) or read.
    """

    def __init__(
        self,
        model: Model,
        parallel: Parallel,
        optim: Optim,
        world: World,
        *,
        total_updates: int,
        experts: Experts = Experts(),  # noqa: B008  (frozen)
        recompute: Sequence[RecomputedPart] = (),
        scalar_head: bool = False,
    ):
        self.world, self.options, self.experts = world, model, experts
        self.source, self.scalar_head = model.path, scalar_head
        built = assemble(
            model, parallel, world, experts=experts, recompute=recompute, scalar_head=scalar_head
        )
        self.hf, self.layers, self.config = built.hf, built.layers, built.config
        self.model, self._source_hf = built.model, built.source
        self.ddp = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
            ),
            self.model,
        )
        self.ddp.broadcast_params()  # random initialisation must not differ between replicas
        self.optimizer = build_optimizer(optim, self.config.params_dtype, self.ddp)
        self.scheduler = build_scheduler(optim, self.optimizer, total_updates)
        self.host_copies = HostCopies(self.ddp, self.optimizer)
        self.version = 0  # optimizer updates so far
        self.config_entries: dict = {}  # what `save_hf` adds to `config.json`
        self._reference: list[torch.Tensor] | None = None

    # -- log-probabilities ------------------------------------------------------------------

    def logprobs(self, batches: list[PackedBatch], temperature: float = 1.0) -> list[torch.Tensor]:
        """Log-probability of every completion token, no gradient.

        Returns:
            One float32 [B, S] grid per micro-batch, 0 under the mask, on every pipeline stage.
        """

        def score(batch, hidden):
            return self._head(hidden, batch, temperature).logprobs()[0]

        return score_batches(self.ddp, batches, score, self.world)

    def values(self, batches: list[PackedBatch]) -> list[torch.Tensor]:
        """The value at every row that predicts a completion token, no gradient; scalar head only.

        Returns:
            One float32 [B, S] grid per micro-batch, 0 under the mask, on every pipeline stage.
        """
        assert self.scalar_head

        def score(batch, values):
            return self._head(values, batch).values()

        return score_batches(self.ddp, batches, score, self.world)

    def record_experts(self):
        """Context that yields the experts of the passes within it, for `update`."""
        return recording(self.model)

    @contextmanager
    def reference(self):
        """Within the block the model has the reference weights (see `keep_reference`)."""
        assert self._reference is not None, "keep_reference was not called"
        self._swap_reference()
        try:
            yield
        finally:
            self._swap_reference()

    def keep_reference(self) -> None:
        """Take the present weights as the reference model (held in host memory)."""
        self._reference = [t.detach().cpu().clone() for _, t, _ in local_tensors(self.model)]

    def _swap_reference(self) -> None:
        for (_, tensor, _), kept in zip(local_tensors(self.model), self._reference, strict=True):
            current = tensor.cpu().clone()
            tensor.copy_(kept)
            kept.copy_(current)
        fp8.forget(self.model)

    # -- update -----------------------------------------------------------------------------

    def update(
        self,
        batches: list[PackedBatch],
        loss: Loss | ValueLoss,
        temperature: float = 1.0,
        *,
        choices: Choices | None = None,
        replay: bool = False,
    ) -> dict[str, float]:
        """One optimizer step on the sum of `loss` over all micro-batches and replicas.

        The loss carries its global denominator, so that the gradient does not depend on how the
        batch was cut.  Metrics are summed likewise, those named `max_*` are maxima.  The losses of
        multi-token prediction (mean over completion tokens) and expert balance (mean over
        sequences) of the packed batch are added by the options `model.mtp_coef` and
        `experts.balance_coef`; "loss" includes the former.  A model in FP8 adds
        `fp8.finish_counting`'s metrics.

        Args:
            choices: experts recorded in a pass over the same batches (`replay.recording`); adds
                `router_agreement` to the metrics.
            replay: use those experts.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; in the first case the
                weights are untouched.
        """
        assert not self.host_copies.is_out, "gradients and optimizer are in host memory"
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        tokens, sequences = self._count(batches)
        balance.start_update(self.model, self.experts.balance_coef / sequences)
        fp8.start_counting(self.model)

        def step(batch, hidden):
            value, metrics = loss(self._head(hidden, batch, temperature), batch)
            if self.options.mtp_coef:
                mtp = self._mtp_loss(hidden, batch, tokens)
                value = value + self.options.mtp_coef * mtp
                metrics = {**metrics, "mtp_loss": mtp}
            metrics = {k: v.detach() for k, v in {"loss": value, **metrics}.items()}
            return value, torch.zeros([], dtype=torch.int), metrics

        with playing(self.model, choices, replay=replay) as players:
            metrics = self._reduce(run_batches(self.ddp, batches, step, forward_only=False))
        if not torch.isfinite(torch.tensor(metrics["loss"])):
            raise FloatingPointError(
                f"the loss of update {self.version + 1} is {metrics['loss']}; nothing was updated"
            )
        agreed = None if choices is None else agreement(players, self.world.device)
        if agreed is not None:
            metrics["router_agreement"] = agreed
        _, grad_norm, _ = self.optimizer.step()
        fp8.forget(self.model)
        if not torch.isfinite(torch.as_tensor(grad_norm)):
            raise FloatingPointError(
                f"the gradient of update {self.version + 1} is {grad_norm}; the weights are "
                f"damaged, resume from the last checkpoint with a lower optim.lr"
            )
        load = balance.finish_update(self.model, self.experts.bias_update_rate)
        self.scheduler.step(1)
        self.version += 1
        lost = fp8.finish_counting(self.model)
        return metrics | load | lost | {"grad_norm": float(grad_norm)}

    def _count(self, batches: list[PackedBatch]) -> tuple[int, int]:
        """Completion tokens and sequences of the global batch, each at least 1."""
        counts = torch.tensor(
            [sum(len(b.targets) for b in batches), sum(len(b.mask) for b in batches)],
            device=self.world.device,
        )
        dist.all_reduce(counts, group=mpu.get_data_parallel_group())
        tokens, sequences = counts.clamp(min=1).tolist()
        return tokens, sequences

    def _mtp_loss(self, hidden, batch: PackedBatch, num_tokens: int) -> torch.Tensor:
        return mtp_loss(
            hidden,
            self.model.head_weight,
            batch,
            depths=self.config.mtp_num_layers,
            num_tokens=num_tokens,
            tp_group=self._tp_group,
        )

    @property
    def learns_from_all_tokens(self) -> bool:
        """Whether tokens without a part in the loss change the weights all the same."""
        experts = self.experts
        return bool(self.options.mtp_coef or experts.balance_coef or experts.bias_update_rate)

    @property
    def _tp_group(self) -> dist.ProcessGroup | None:
        return mpu.get_tensor_model_parallel_group() if self.world.tp > 1 else None

    def _head(
        self, output: torch.Tensor, batch: PackedBatch, temperature: float = 1.0
    ) -> Head | ValueHead:
        """What the loss is given of `output`, the last stage's."""
        rows = output.index_select(0, batch.rows)
        if self.scalar_head:
            return ValueHead(rows)
        return Head(
            rows,
            self.model.head_weight,
            batch.targets,
            {"temperature": temperature, "tp_group": self._tp_group},
        )

    def _reduce(self, per_batch: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Over micro-batches, then over replicas."""
        metrics = None
        if self.world.is_last_stage:
            names = list(per_batch[0])
            values = torch.stack([torch.stack([m[n].double() for n in names]) for m in per_batch])
            total, largest = values.sum(0), values.amax(0)
            group = mpu.get_data_parallel_group()
            dist.all_reduce(total, group=group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            metrics = {
                name: (largest if name.startswith("max_") else total)[i].item()
                for i, name in enumerate(names)
            }
        return from_last_stage(metrics, self.world)

    # -- weights ----------------------------------------------------------------------------

    def sync_plan(self, bucket_mib: int = 1024, names: Collection[str] | None = None) -> SyncPlan:
        """How whole weights travel to every rank, in buckets of at most `bucket_mib`.

        Args:
            names: of the tensors; without multi-token prediction by default, as the generator
                wants them.
        """
        shapes = hf_shapes(self.hf, mtp=True)
        shapes = {name: shapes[name] for name in names or hf_shapes(self.hf)}
        return plan_sync(
            shapes,
            hf_splits(shapes),
            dtype=self.config.params_dtype,
            tp=self.world.tp,
            ep=self.world.ep,
            layers=self.layers,
            experts=self.config.num_moe_experts or 0,
            bucket_bytes=bucket_mib << 20,
            copies={name: shared_name(name) for name in shapes if shared_name(name) != name},
        )

    def export_buckets(self, plan: SyncPlan) -> Iterator[Named]:
        """Whole tensors in buckets, to be let go of one by one; see `export.export_buckets`."""
        return export_buckets(self.model, plan)

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors by Hugging Face name, without multi-token prediction unless named.

        See `export.export_weights`.
        """
        return export_weights(self.model, self.sync_plan(names=names))

    def export_whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """`export` with multi-token prediction; see `carry.export_whole`."""
        return export_whole(
            self.export,
            self.hf,
            HFReader(self.source, self._source_hf) if self.options.init == "load" else None,
            mtp_is_trained=bool(self.config.mtp_num_layers),
            dtype=self.config.params_dtype,
            is_writer=self.world.is_main,
        )

    def save_hf(self, folder, dtype: ExportDtype | None = None) -> None:
        """Write a folder that transformers and vLLM load, in `dtype` or the model's; collective."""
        own = "fp32" if self.config.params_dtype == torch.float32 else "bf16"
        write_model_folder(
            folder,
            self.export_whole(),
            like=self.source,
            is_writer=self.world.is_main,
            dtype=dtype or own,
            adapt=self._describe,
        )

    def _describe(self, config: dict) -> dict:
        """`config.json` of this model from that of its source."""
        config = describe_scalar_head(config) if self.scalar_head else config
        return config | self.config_entries

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]
