"""What a benchmark case is, and the check that an op must pass before any figure of it is shown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from r1kern.benchmarks.harness import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Shape = dict[str, int | float | str]
Tensors = tuple[Tensor, ...]
Forward = Callable[[Shape, Tensors], Tensors]


class Prepared(NamedTuple):
    """A rival in layouts of its own: what is made of the case's tensors beforehand is not timed.

    Attributes:
        bind: (shape, tensors) -> the run that is timed.
        restore: (shape, tensors, its results) -> results as the op returns them.
    """

    bind: Callable[[Shape, Tensors], Callable[[], Tensors]]
    restore: Callable[[Shape, Tensors, Tensors], Tensors] = lambda shape, tensors, results: results


class Inputs(NamedTuple):
    """Arguments of a forward, those that get a gradient requiring it, and the gradients of its
    differentiable results (none: the one result is a loss)."""

    tensors: Tensors
    upstream: Tensors = ()


@dataclass(frozen=True)
class Case:
    """One op with its shapes, its reference and its rivals.

    Attributes:
        outputs: names of the forward's results and then of the gradients, in order.
        shapes: the shapes measured, by kind of device ("cpu", "cuda"); each names its "dtype".
        edges: further shapes that `--check` goes through.
        shrink: a measured shape -> the shape that is checked before it is timed.
        inputs: (shape, device, seed) -> `Inputs`.
        ours: the op: (shape, tensors) -> results.
        reference: plain torch, generic in dtype: the truth in float64, the yardstick in the op's
            own dtype.
        work: what a run must do at least.
        baselines: name -> maker of a forward, called with the kind of device.  It raises
            ImportError where it does not install; its forward may return fewer results.
        trains: timed with the backward.
        compared: what is compared of the results of the op, of its reference and of its rivals,
            where that is not the results themselves.
        exact: the truth in float64, compared as it is, where the reference in float64 is none.
        margin: the error allowed, in errors of the reference in the op's own dtype ...
        slack: ... and besides, in units of the truth; None: 8 last places.
        forgiven: how far a rival's results may be from the truth.
        precision: "fp8" where the products' limit is that of FP8.
        published: label of a shape -> what others published for it, not measured here.
    """

    outputs: tuple[str, ...]
    shapes: dict[str, list[Shape]]
    edges: dict[str, list[Shape]]
    shrink: Callable[[Shape], Shape]
    inputs: Callable[[Shape, torch.device, int], Inputs]
    ours: Forward
    reference: Forward
    work: Callable[[Shape], Work]
    baselines: dict[str, Callable[[str], Forward | Prepared]] = field(default_factory=dict)
    trains: bool = False
    compared: Callable[[Shape, Tensors, Tensors], Tensors] = lambda shape, inputs, results: results
    exact: Forward | None = None
    margin: float = 3
    slack: float | None = None
    forgiven: float = 0.05
    precision: str = ""
    published: dict[str, str] = field(default_factory=dict)


def run(forward: Forward, shape: Shape, inputs: Inputs, gradients: bool) -> Tensors:
    """The forward's results and, when asked for, the gradients of the inputs that require one."""
    with torch.set_grad_enabled(gradients):
        results = forward(shape, inputs.tensors)
    leaves = [x for x in inputs.tensors if x.requires_grad]
    if not gradients or not leaves:
        return results
    grown = [x for x in results if x.requires_grad]
    return *results, *torch.autograd.grad(grown, leaves, inputs.upstream or None)


def label(shape: Shape) -> str:
    """`T=8192 H=7168 bf16`: the shape's name in rows."""
    sizes = (f"{name}={value}" for name, value in shape.items() if name != "dtype")
    return " ".join([*sizes, str(shape["dtype"])])


def check(case: Case, shape: Shape, device: torch.device) -> str | None:
    """What is wrong with the op at this shape, or None.

    Forward and gradients against the float64 truth: the error (root mean square) is at most 3 times
    that of plain torch in the op's dtype, give or take 8 last places (or what the case allows);
    integers are equal; a second run gives the same bits.  Each run has inputs of its own: there are
    ops that add to one.
    """

    def results(forward: Forward, inputs: Inputs) -> Tensors:
        return case.compared(shape, inputs.tensors, run(forward, shape, inputs, True))

    inputs = [case.inputs(shape, device, 0) for _ in range(3)]
    got, again, plain = map(results, (case.ours, case.ours, case.reference), inputs)
    truth = true_results(case, shape, device, True)
    for name, x, second, p, t in zip(case.outputs, got, again, plain, truth, strict=True):
        if x.shape != t.shape:
            return f"{name}: shape {list(x.shape)}, not {list(t.shape)}"
        if not torch.equal(x, second):
            return f"{name}: two runs differ (or NaN)"
        if not x.is_floating_point():
            if not torch.equal(x, t.to(x.dtype)):
                return f"{name}: {int((x != t).sum())} of {x.numel()} differ"
        elif x.numel():
            error = rms(x - t)
            slack = 8 * torch.finfo(x.dtype).eps if case.slack is None else case.slack
            allowed = case.margin * rms(p - t) + slack * rms(t)
            if not error <= allowed:
                return f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    return None


def differs(
    case: Case, forward: Forward | Prepared, shape: Shape, device: torch.device
) -> str | None:
    """Why a baseline does not compute the same thing, or None.

    Of the forward's results it may give the first ones only, of the gradients it gives all.
    """
    truth = true_results(case, shape, device, case.trains)
    inputs = case.inputs(shape, device, 0)
    got = ready(case, forward, shape, inputs)()
    if isinstance(forward, Prepared):
        got = forward.restore(shape, inputs.tensors, got)
    got = case.compared(shape, inputs.tensors, got)
    grads = sum(x.requires_grad for x in inputs.tensors) if case.trains else 0
    given = len(got) - grads
    kept = [*range(given), *range(len(truth) - grads, len(truth))]
    for i, x in zip(kept, got, strict=True):
        name, t = case.outputs[i], truth[i]
        if x.is_floating_point() and x.numel():
            error = rms(x - t) / rms(t).clamp(min=1e-30)
            if not error <= case.forgiven:
                return f"computes something else: {name} is {error:.0%} away"
    return None


def true_results(case: Case, shape: Shape, device: torch.device, gradients: bool) -> Tensors:
    """What is to come out, in float64."""
    inputs = in_float64(case.inputs(shape, device, 0))
    results = run(case.exact or case.reference, shape, inputs, gradients)
    return results if case.exact else case.compared(shape, inputs.tensors, results)


def ready(
    case: Case, forward: Forward | Prepared, shape: Shape, inputs: Inputs
) -> Callable[[], Tensors]:
    """What is timed of a forward."""
    if isinstance(forward, Prepared):
        return forward.bind(shape, inputs.tensors)
    return functools.partial(run, forward, shape, inputs, case.trains)


def in_float64(inputs: Inputs) -> Inputs:
    def widen(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return Inputs(*(tuple(map(widen, tensors)) for tensors in inputs))


def rms(x: Tensor) -> Tensor:
    return x.detach().double().square().mean().sqrt()


def plainly(forward: Forward) -> Callable[[str], Forward]:
    """Plain torch as a baseline."""
    return lambda kind: forward


def compiled(forward: Forward) -> Callable[[str], Forward]:
    """torch.compile of plain torch as a baseline, compiled afresh for every shape."""

    def make(kind: str) -> Forward:
        if kind == "cpu":
            raise ImportError("not measured on a CPU, where each shape compiles for 20 s or more")
        torch._dynamo.reset()
        return torch.compile(forward, dynamic=False)

    return make
