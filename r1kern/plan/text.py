"""A plan as text: concise tables, every modelled figure under the word modelled."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from r1kern.plan.layouts import Found
from r1kern.plan.make import Plan
from r1kern.plan.memory import COMPONENTS, PHASES

GiB = 2**30


def show(plan: Plan, found: list[Found], console: Console) -> None:
    """Print the plan.

    Args:
        found: from `layouts.nearest`, empty when the plan fits.
    """
    p = plan.layout
    mtp = "with" if plan.shapes.depths else "without"
    console.print(
        f"[bold]{plan.parameters:,}[/] parameters ({mtp} multi-token prediction, routing biases "
        f"left out), {p.world} x {plan.gpu.name}, {p}, experts DP{p.expert_dp}; "
        f"{plan.microbatches} micro-batches of {plan.config.train.tokens_per_microbatch} rows an "
        f"update; mean prompt {plan.lengths.prompt:.0f}, completion {plan.lengths.response:.0f}, "
        f"at most {plan.lengths.budget} tokens"
    )
    console.print(_stages(plan))
    console.print(_memory(plan))
    console.print(_host(plan))
    console.print(_work(plan))
    console.print(_seconds(plan))
    console.print("assumed: " + "; ".join(plan.assumed.lines()), style="dim")
    _verdict(plan, found, console)


def _stages(plan: Plan) -> Table:
    table = _table("Parameters of a rank, by pipeline stage", "stages", "layers", "dense", "expert")
    for first, last, stage in _runs(plan):
        name = str(first) if first == last else f"{first}-{last}"
        table.add_row(name, str(stage.layers), f"{stage.dense:,}", f"{stage.expert:,}")
    return table


def _runs(plan: Plan):
    """Stages next to each other that are alike: first, last, stage."""
    runs = []
    for i, stage in enumerate(plan.stages):
        if runs and runs[-1][2] == stage:
            runs[-1][1] = i
        else:
            runs.append([i, i, stage])
    return runs


def _memory(plan: Plan) -> Table:
    stage = plan.fullest
    table = _table(f"GiB of a GPU, stage {stage} (the fullest)", "", *PHASES)
    phases = plan.phases[stage]
    for component in COMPONENTS:
        values = [phases[phase].get(component, 0.0) for phase in PHASES]
        if any(values):
            table.add_row(component, *(f"{v / GiB:.1f}" for v in values))
    limit = plan.gpu.memory
    totals = [sum(phases[phase].values()) for phase in PHASES]
    table.add_row(
        f"all of {limit / GiB:.1f}",
        *(f"[{'red' if t > limit else 'green'}]{t / GiB:.1f}[/]" for t in totals),
    )
    return table


def _host(plan: Plan) -> Table:
    worst = max(plan.host, key=lambda parts: sum(parts.values()))
    table = _table("GiB of a node's host", "", "GiB")
    for component, value in worst.items():
        if value:
            table.add_row(component, f"{value / GiB:.0f}")
    table.add_row(f"all of {plan.gpu.host_memory / GiB:.0f}", f"{sum(worst.values()) / GiB:.0f}")
    return table


def _work(plan: Plan) -> Table:
    work = plan.step_work()  # of the stage that does most
    table = _table(
        "A micro-batch on the busiest stage, both ways",
        "what",
        "ranks",
        "calls",
        "amount",
    )
    table.add_row("matrix products", "", "", f"{work.flops / 1e12:.1f} TFLOP")
    if work.fp8_flops:
        table.add_row("matrix products in FP8", "", "", f"{work.fp8_flops / 1e12:.1f} TFLOP")
    table.add_row("attention", "", "", f"{work.attention_flops / 1e12:.1f} TFLOP")
    for (name, ranks), sent in sorted(work.traffic.items()):
        table.add_row(name, str(ranks), str(work.calls[name, ranks]), f"{sent / GiB:.2f} GiB")
    stage, p = plan.stages[plan.fullest], plan.layout
    once = 4 + plan.shapes.itemsize
    for name, size, ranks in (("dense", stage.dense, p.dp), ("expert", stage.expert, p.expert_dp)):
        if ranks > 1 and size:
            label = f"{name} gradients and weights, once an update"
            table.add_row(
                label, str(ranks), "", f"{size * once * (ranks - 1) / ranks / GiB:.2f} GiB"
            )
    if p.pp > 1:
        rows = plan.config.train.tokens_per_microbatch
        sent = 2 * rows / p.tp * plan.shapes.hidden * plan.shapes.itemsize
        table.add_row("to the next stage and back", "2", "2", f"{sent / GiB:.2f} GiB")
    return table


def _seconds(plan: Plan) -> Table:
    table = _table("Seconds of a step, modelled", "phase", "s, modelled")
    for phase, seconds in plan.seconds.items():
        if seconds:
            table.add_row(phase, f"{seconds:.1f}")
    table.add_row("step", f"{sum(plan.seconds.values()):.1f}")
    return table


def _verdict(plan: Plan, found: list[Found], console: Console) -> None:
    if plan.fits:
        room = (plan.gpu.memory - plan.peak) / GiB
        console.print(f"[green]fits[/]: {room:.1f} GiB of each GPU to spare")
        return
    for line in does_not_fit(plan):
        console.print(f"[red]does not fit[/]: {escape(line)}")
    if not found:
        console.print("no layout of this world size fits (context parallelism is not supported)")
        return
    console.print("nearest layouts that fit (context parallelism is not supported):")
    for f in found:
        seconds = sum(f.plan.seconds.values())
        peak_gib = f.plan.peak / GiB
        console.print(
            f"  {' '.join(f.options())}: {peak_gib:.1f} GiB, {seconds:.0f} s a step modelled",
            markup=False,
        )


REMEDIES = {
    "rollout": "raise parallel.generator_tp, set generator.fp8 or lower generator.kv_cache_gib",
    "log-probs": "lower train.tokens_per_microbatch or raise parallel.tp",
    "update": "lower train.tokens_per_microbatch, or raise parallel.tp or parallel.pp",
    "optimizer step": "raise parallel.pp or parallel.ep",
    "sync": "raise parallel.generator_tp or lower generator.sync_bucket_mib",
}


def _remedy(phase: str, plan: Plan) -> str:
    """What can be done, options that are set already left out."""
    options = []
    if phase in ("update", "optimizer step") and not plan.config.optim.offload:
        options.append("optim.offload=true")
    if phase == "update" and "full" not in plan.config.train.recompute:
        options.append("train.recompute=[full]")
    return (f"set {' or '.join(options)}, or " if options else "") + REMEDIES[phase]


def does_not_fit(plan: Plan) -> list[str]:
    """Each phase that does not fit, with what it needs and what can be done."""
    lines, limit = [], plan.gpu.memory
    for phase in PHASES:
        need, stage = max((sum(p[phase].values()), -i) for i, p in enumerate(plan.phases))
        if need > limit:
            lines.append(
                f"{phase} needs {need / GiB:.1f} of {limit / GiB:.1f} GiB on stage {-stage}: "
                f"{_remedy(phase, plan)}"
            )
    if plan.host_peak > plan.gpu.host_memory:
        lines.append(
            f"a node's host needs {plan.host_peak / GiB:.0f} of {plan.gpu.host_memory / GiB:.0f} "
            f"GiB: more nodes, or train.async_save=false"
        )
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
