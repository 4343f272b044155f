"""The FP8 grouped products in CUDA C++ (`csrc/hopper`): TMA, wgmma, warpgroups with roles, sm_90a.

Launches only: no host sync, no allocation, nothing that a CUDA graph cannot capture.  The sizes of
the groups stay on the device.  DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3): the tensor
cores sum 128 products, each sum is scaled and added in float32.

Shape legend: E experts, R rows of all experts sorted by expert, N out, K in, KB and NB blocks of
128 of K and of N, P rows of the padded layout in which an expert starts at a multiple of 128.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from r1kern.errors import UserError

_hopper = import_module("r1kern._hopper") if find_spec("r1kern._hopper") else None

BLOCK = 128
COLUMNS = 256
"""Columns of a tile, as in csrc/hopper/schedule.h."""
MAX_EXPERTS = 1024
LIMIT = 2**31 - 2**16
"""Rows and tiles are counted in 32 bits on the device."""

E4M3 = torch.float8_e4m3fn
OUT = {torch.bfloat16: False, torch.float32: True}


def available(device: torch.device) -> bool:
    """Whether the kernels are built and `device` is a GPU they run on (capability 9.0)."""
    return (
        _hopper is not None
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


def grouped_gemm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, out: Tensor
) -> None:
    """out[r, n] = sum_kb a_scales[kb, r] b_scales[e, n / 128, kb] (a[r] . b[e, n] in block kb).

    Args:
        a: e4m3 [R, K], contiguous; rows from offsets[E] on are not read into anything.
        a_scales: float32 [KB, R], rows at a stride of a multiple of 4.
        b: e4m3 [E, N, K], contiguous.
        b_scales: float32 [E, NB, KB], any strides.
        offsets: int64 [E + 1] on the device, the first row of each expert and the end.
        out: bfloat16 or float32 [R, N], contiguous; rows from offsets[E] on are left as they are.

    Raises:
        UserError: a shape, dtype, layout or device that the kernel does not take.
    """
    (R, K), (E, N, _) = _rank("a", a, 2), _rank("b", b, 3)
    _multiple(N=N, K=K)
    _is("a", a, (R, K), E4M3)
    _is("b", b, (E, N, K), E4M3)
    _is("a_scales", a_scales, (K // BLOCK, R), torch.float32)
    _is("b_scales", b_scales, (E, N // BLOCK, K // BLOCK), torch.float32)
    _is("offsets", offsets, (E + 1,), torch.int64)
    if out.dtype not in OUT:
        raise UserError(f"out is {out.dtype}: make it bfloat16 or float32")
    _is("out", out, (R, N), out.dtype)
    if R == 0:
        return
    _contiguous(a=a, b=b, offsets=offsets, out=out)
    _aligned(a=a, b=b, a_scales=a_scales, out=out)
    if (R > 1 and a_scales.stride(1) != 1) or a_scales.stride(0) % 4 or a_scales.stride(0) < R:
        raise UserError(
            f"a_scales has strides {a_scales.stride()}: take [KB, R] of an allocation whose rows "
            "are a multiple of 4 long"
        )
    _limits(E, R, (R // BLOCK + E) * -(-N // COLUMNS))
    _on_one_device(a=a, b=b, a_scales=a_scales, b_scales=b_scales, offsets=offsets, out=out)
    _launch(
        "grouped_gemm",
        a.device,
        a=a.data_ptr(),
        a_scales=a_scales.data_ptr(),
        b=b.data_ptr(),
        b_scales=b_scales.data_ptr(),
        offsets=offsets.data_ptr(),
        out=out.data_ptr(),
        R=R,
        N=N,
        K=K,
        E=E,
        a_scales_stride=a_scales.stride(0),
        b_scales_expert_stride=b_scales.stride(0),
        b_scales_block_stride=b_scales.stride(1),
        b_scales_depth_stride=b_scales.stride(2),
        out_is_float=OUT[out.dtype],
    )


def grouped_wgrad(
    a_t: Tensor,
    a_scales: Tensor,
    b_t: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    grad_table: Tensor,
    N: int,
    K: int,
) -> None:
    """grad[e][n, k] += sum over e's blocks pb of 128 rows p:
    a_scales[pb, n] b_scales[pb, k] (a_t[n] . b_t[k] in block pb).

    Expert e's rows start at the sum of the earlier experts' counts, each rounded up to a multiple
    of 128; codes between its last row and that are 0.  What lies behind the last expert is not read
    into anything.  An expert without rows leaves its gradient untouched.  The sum in memory treats
    subnormal numbers as 0.

    Args:
        a_t, a_scales: e4m3 [N, P] and float32 [P / 128, N], contiguous.
        b_t, b_scales: e4m3 [K, P] and float32 [P / 128, K], contiguous.
        offsets: int64 [E + 1] on the device, the running sum of the experts' counts.
        grad_table: int64 [E] on the device, addresses of float32 [N, K] matrices, contiguous, at
            multiples of 8 bytes.

    Raises:
        UserError: a shape, dtype, layout or device that the kernel does not take.
    """
    (_, P), (E,) = _rank("a_t", a_t, 2), _rank("grad_table", grad_table, 1)
    _multiple(N=N, K=K, P=P)
    _is("a_t", a_t, (N, P), E4M3)
    _is("b_t", b_t, (K, P), E4M3)
    _is("a_scales", a_scales, (P // BLOCK, N), torch.float32)
    _is("b_scales", b_scales, (P // BLOCK, K), torch.float32)
    _is("offsets", offsets, (E + 1,), torch.int64)
    _is("grad_table", grad_table, (E,), torch.int64)
    if P == 0:
        return
    operands = dict(a_t=a_t, b_t=b_t, a_scales=a_scales, b_scales=b_scales)
    _contiguous(**operands, offsets=offsets, grad_table=grad_table)
    _aligned(**operands)
    _limits(E, P, E * (N // BLOCK) * -(-K // COLUMNS))
    _on_one_device(**operands, offsets=offsets, grad_table=grad_table)
    _launch(
        "grouped_wgrad",
        a_t.device,
        a_t=a_t.data_ptr(),
        a_scales=a_scales.data_ptr(),
        b_t=b_t.data_ptr(),
        b_scales=b_scales.data_ptr(),
        offsets=offsets.data_ptr(),
        grads=grad_table.data_ptr(),
        P=P,
        N=N,
        K=K,
        E=E,
    )


def _launch(name: str, device: torch.device, **arguments: int) -> None:
    if not available(device):
        raise UserError(
            f"the Hopper kernels do not run on {device}: they need a GPU of capability 9.0 and a "
            "build with nvcc of CUDA 12.8 or newer (pip install -e . with CUDA_HOME set)"
        )
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        getattr(_hopper, name)(device=stream.device_index, stream=stream.cuda_stream, **arguments)


def _rank(name: str, x: Tensor, rank: int) -> torch.Size:
    if x.dim() != rank:
        raise UserError(f"{name} has {x.dim()} dimensions: give it {rank}")
    return x.shape


def _multiple(**sizes: int) -> None:
    for name, size in sizes.items():
        if size % BLOCK or (size == 0 and name != "P"):
            raise UserError(f"{name} is {size}: the Hopper kernels take multiples of {BLOCK}")


def _is(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise UserError(f"{name} is {x.dtype} {list(x.shape)}: make it {dtype} {list(shape)}")


def _contiguous(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise UserError(f"{name} has strides {x.stride()}: make it contiguous")


def _aligned(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.data_ptr() % 16:
            raise UserError(f"{name} starts at no multiple of 16 bytes: copy it to an allocation")


def _limits(E: int, rows: int, tiles: int) -> None:
    if not 1 <= E <= MAX_EXPERTS:
        raise UserError(f"E is {E}: the Hopper kernels take 1 to {MAX_EXPERTS} experts")
    if max(rows, tiles) > LIMIT:
        raise UserError(f"{rows} rows make {tiles} tiles: split them, at most {LIMIT} of either")


def _on_one_device(**tensors: Tensor) -> None:
    devices = {name: str(x.device) for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        raise UserError(f"the operands are on several devices ({devices}): move them to one")
