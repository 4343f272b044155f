"""Operands of the Hopper kernels on torch's default device, and runs that poison what is around.

Where operands are small integers and scales powers of two ("exact"), nothing is rounded anywhere:
sums of 128 products fit the tensor cores' accumulators, and the results must be the truth bit for
bit.
"""

from __future__ import annotations

import torch
from truth import F64

from r1kern.kernels import fp8_gemm_hopper as hopper

NAN = 0x7F  # the code of e4m3 that is no number
GROUPS = {
    "ragged": [5, 0, 131, 128, 1, 300, 0],
    "one row each": [1, 1, 1, 1],
    "one-hot": [0, 0, 517, 0],
    "dense": [640],
    "dense, one row": [1],
    "empty": [0, 0, 0],
    "many experts": [(7 * e) % 13 * (e % 3 == 0) for e in range(256)],
    "bands": [128 * 35 + 7, 64],
}


def offsets_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def codes(exact, *shape):
    x = torch.randint(-2, 3, shape).float() if exact else torch.randn(shape) * 30
    return x.to(hopper.E4M3)


def scales(exact, *shape):
    return torch.randint(-1, 2, shape).float().exp2() if exact else torch.rand(shape) + 0.5


def nan_codes(x, where):
    x.view(torch.uint8)[where] = NAN


def padded_scales(x):
    """[KB, R] in rows of a multiple of 4, and of NaN behind R."""
    KB, R = x.shape
    return torch.full((KB, (R + 7) // 4 * 4), torch.nan)[:, :R].copy_(x)


def blocks(x, dims):
    for dim in dims:
        x = x.repeat_interleave(128, dim)
    return x


def gemm_case(sizes, N, K, exact, behind=9):
    """Operands with `behind` rows of NaN behind the last expert's, and the float64 truth."""
    torch.manual_seed(0)
    offsets, E = offsets_of(sizes), len(sizes)
    R = int(offsets[-1]) + behind
    a, b = codes(exact, R, K), codes(exact, E, N, K)
    a_scales, b_scales = scales(exact, K // 128, R), scales(exact, E, N // 128, K // 128)
    nan_codes(a, slice(R - behind, R))
    a_scales[:, R - behind :] = torch.nan
    rows = a.to(F64) * blocks(a_scales.to(F64).T, [1])
    weights = b.to(F64) * blocks(b_scales.to(F64), [1, 2])
    parts = zip(rows[: R - behind].split(list(sizes)), weights, strict=True)
    truth = torch.cat([part @ weight.T for part, weight in parts])
    operands = dict(a=a, a_scales=padded_scales(a_scales), b=b, b_scales=b_scales, offsets=offsets)
    return operands, truth


def run_gemm(operands, truth, dtype):
    """The rows of the experts; all around them must stay as it was."""
    R, N = operands["a"].shape[0], operands["b"].shape[1]
    memory = torch.full((R + 256, N), torch.nan, dtype=dtype)
    hopper.grouped_gemm(**operands, out=memory[128 : 128 + R])
    live = slice(128, 128 + len(truth))
    got = memory[live].clone()
    memory[live] = torch.nan
    assert memory.isnan().all()
    return got


def wgrad_case(sizes, N, K, exact, behind=256):
    """Operands padded per expert, NaN behind the last; gradients that hold something before."""
    torch.manual_seed(0)
    offsets, E = offsets_of(sizes), len(sizes)
    counts = torch.tensor(sizes)
    starts = offsets_of(((counts + 127) // 128 * 128).tolist())
    P = int(starts[-1]) + behind
    a, b = codes(exact, N, P), codes(exact, K, P)
    a_scales, b_scales = scales(exact, P // 128, N), scales(exact, P // 128, K)
    for e in range(E):
        tail = slice(int(starts[e] + counts[e]), int(starts[e + 1]))
        a.view(torch.uint8)[:, tail] = 0
        b.view(torch.uint8)[:, tail] = 0
    for x, x_scales in ((a, a_scales), (b, b_scales)):
        nan_codes(x, (slice(None), slice(P - behind, P)))
        x_scales[(P - behind) // 128 :] = torch.nan
    before = torch.randint(-9, 10, (E, N, K)).float()
    left = a.to(F64) * blocks(a_scales.to(F64), [0]).T
    right = b.to(F64) * blocks(b_scales.to(F64), [0]).T
    truth = before.to(F64)
    for e in range(E):
        live = slice(int(starts[e]), int(starts[e + 1]))
        truth[e] += left[:, live] @ right[:, live].T
    operands = dict(a_t=a, a_scales=a_scales, b_t=b, b_scales=b_scales, offsets=offsets, N=N, K=K)
    return operands, before, truth


def run_wgrad(operands, before):
    """Each expert's gradient is an allocation of its own, with NaN around it."""
    memory = [torch.full((x.numel() + 64,), torch.nan) for x in before]
    grads = [x[32:-32].view(before[0].shape) for x in memory]
    for grad, x in zip(grads, before, strict=True):
        grad.copy_(x)
    hopper.grouped_wgrad(**operands, grad_table=torch.tensor([x.data_ptr() for x in grads]))
    assert all(x[:32].isnan().all() and x[-32:].isnan().all() for x in memory)
    return torch.stack(grads)
