"""Worker of test_plan, all in one process: `plan.py DEMO_MODEL V3_MODEL CONFIG...`."""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from r1kern import distributed
from r1kern.config import TrainConfig, load_config

ROOT = Path(__file__).resolve().parent.parent.parent
FP8 = {"precision": "fp8_blockwise", "fp8_linears": True}


def configs(*names: str) -> None:
    """Plan each config; one JSON line each. A name may be followed by overrides, `+`-joined."""
    from r1kern.plan import command
    from r1kern.plan.layouts import widths
    from r1kern.plan.make import model_as_built

    for i, item in enumerate(names):
        name, *overrides = item.split("+")
        hardware = "h20" if name == "r1_671b_96" else "h100"
        options = load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml", overrides)
        started, printed = time.process_time(), io.StringIO()
        files = {"json_file": Path(f"{i}.json"), "picture": Path(f"{i}.svg")}
        console = Console(file=printed, width=200)
        plan = command.run(options, hardware=hardware, console=console, **files)
        model = options.model.model_copy(update=FP8)
        in_fp8 = replace(plan, config=options.model_copy(update={"model": model}))
        line = {
            "fp8_widths": widths(in_fp8, model_as_built(options)),
            "search_is_exact": _search_is_exact(plan),
            "fits": plan.fits,
            "seconds": time.process_time() - started,
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "text": printed.getvalue(),
        }
        print("PLAN", json.dumps(line), flush=True)


def _search_is_exact(plan) -> bool:
    """Stages added up from measured layers hold what the real stages hold."""
    from r1kern.plan.layouts import stages_of

    summed = stages_of(plan.layout, plan.costs, plan.shapes)
    return [(s.dense, s.expert) for s in summed] == [(s.dense, s.expert) for s in plan.stages]


def layer(folder: str, rows: int = 2048) -> None:
    """The cost of a mixture-of-experts layer on TP2 x EP8, in bfloat16 and in FP8."""
    from r1kern.hf.config import read_hf_config
    from r1kern.model.fp8 import Precision
    from r1kern.plan import dry

    hf = read_hf_config(folder)
    hf.first_k_dense_replace = hf.num_nextn_predict_layers = 0
    precisions = {"bf16": None, "experts": Precision(), "linears": Precision(linears=True)}
    options = {"tp": 2, "ep": 8, "rows": rows, "length": 512, "dtype": torch.bfloat16}
    costs = {
        name: asdict(dry.measure(hf, **options, precision=precision)["moe"])
        for name, precision in precisions.items()
    }
    for cost in costs.values():
        for way in ("forward", "backward"):
            cost[way] = {n: cost[way][n] for n in ("flops", "fp8_flops", "moved", "kernels")}
    print("LAYER", json.dumps(costs))


def demo(folder: str, *options: str) -> None:
    """Bytes of a real update on the CPU, and of its plan, as one JSON line."""
    rows, length = 2048, 64
    overrides = [
        f"model.path={folder}",
        f"train.tokens_per_microbatch={rows}",
        "model.init=random",
        "generator.kv_cache_gib=0.25",
        *options,
    ]
    config = load_config(TrainConfig, ROOT / "configs" / "demo.yaml", overrides)
    measured = _measured(config, rows, length)
    from r1kern.plan.make import make_plan

    plan = make_plan(config, prompt_tokens=20, response_tokens=length - 20, device="cpu")
    phase = plan.phases[0]["update"]
    planned = {name: phase[name] for name in ("weights", "gradients", "optimizer", "FP8 codes")}
    planned["activations"] = sum(piece.saved for piece in plan.pieces(0))
    print("DEMO", json.dumps({"measured": measured, "planned": planned}))


def _measured(config: TrainConfig, rows: int, length: int) -> dict[str, int]:
    world = distributed.start()
    from r1kern.model import fp8
    from r1kern.model.core_attention import Packing
    from r1kern.plan.trace import SavedBytes
    from r1kern.train.packing import pack
    from r1kern.train.policy import Policy
    from r1kern.types import Sequence

    policy = Policy(config.model, config.parallel, config.optim, world, total_updates=1)
    sequence = Sequence(tuple(range(20)), tuple(range(20, length + 1)), 1.0)
    (batch,) = pack([sequence] * (rows // length), budget=rows, dp=1, dp_rank=0)
    assert batch.tokens.numel() == rows

    def loss(head, batch):
        logp, _ = head.logprobs()
        return -logp.mean(), {}

    policy.update([batch], loss)
    saved = SavedBytes(policy.model)
    with saved.watch():
        packing = Packing.of(batch.cu_seqlens)
        out = policy.ddp(batch.tokens[None], batch.positions[None], None, packed_seq_params=packing)
    activations = saved.total()
    del out
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    states = [s for o in optimizers for s in o.optimizer.state.values()]
    buffers = [*policy.ddp.buffers, *policy.ddp.expert_parallel_buffers]
    measured = {
        "weights": _bytes(policy.model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _bytes(v for s in states for v in s.values() if torch.is_tensor(v)),
        "activations": activations,
        "FP8 codes": fp8.codes_bytes(policy.model),
    }
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    distributed.shutdown()
    return measured


def _bytes(tensors) -> int:
    """Of the parts that the tensors see: buffers are shared by several of them."""
    return sum(t.nbytes for t in tensors)


def back(model: str) -> None:
    """The back-test's rows."""
    from r1kern.plan import backtest

    print("BACK", json.dumps([c.__dict__ for c in backtest.compare(model)]))


if __name__ == "__main__":
    demo(sys.argv[1])
    demo(sys.argv[1], *(f"model.{name}={value}" for name, value in FP8.items()))
    layer(sys.argv[2])
    back(sys.argv[2])
    configs(*sys.argv[3:])
