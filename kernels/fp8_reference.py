"""Blockwise FP8 in plain torch, the truth of the kernels (arXiv 2412.19437, section 3.3).

Every tile or block has a float32 scale, amax / 448 (or the next power of two), and e4m3 codes,
value / scale rounded to nearest even.  NaN takes no part in amax and has the code NaN; infinity
makes its tile NaN and 0.  A tile of zeros has the smallest normal number for a scale.

Shape legend: R rows sorted by expert (ragged, no padding), E experts, K columns, N rows of a
weight, I width of an expert, P rows with each expert's padded to a multiple of 128, KB = ceil(K /
128) blocks and so on.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
CODE = torch.float8_e4m3fn
LARGEST = torch.finfo(CODE).max  # 448
TINY = torch.finfo(torch.float32).tiny


def blocks(size: int) -> int:
    """ceil(size / 128)."""
    return -(-size // BLOCK)


def padded_rows(R: int, E: int) -> int:
    """P, enough for any E counts whose sum is R, without asking the device for them."""
    return (R + (BLOCK - 1) * E) // BLOCK * BLOCK


def padded_offsets(offsets: Tensor) -> Tensor:
    """int64 [E + 1] -> int64 [E + 1]: first row of each expert among the P, and the end."""
    counts = offsets.diff()
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    return torch.cat([padded.new_zeros(1), padded.cumsum(0)])


def empty_row_scales(R: int, K: int, device: torch.device) -> Tensor:
    """float32 [KB, R]; a line starts at a multiple of 16 bytes, as a tensor map demands."""
    return torch.empty(blocks(K), -(-R // 4) * 4, dtype=torch.float32, device=device)[:, :R]


def scales_of(amax: Tensor, power_of_two: bool) -> Tensor:
    """Largest magnitudes, float32 -> scales, float32."""
    scales = (amax / LARGEST).clamp(min=TINY)
    if power_of_two:  # the exponent's bits, one more where any of the fraction's is set
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scales


def amax(tiles: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Largest magnitude along `dims`, NaN left out."""
    magnitudes = tiles.abs()
    return torch.where(magnitudes.isnan(), 0.0, magnitudes).amax(dims)


def quantize_rows(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """[R, K] -> codes [R, K] and float32 scales [KB, R] of tiles of 1 x 128."""
    R, K = x.shape
    tiles = F.pad(x.float(), (0, -K % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = empty_row_scales(R, K, x.device)
    scales.copy_(scales_of(amax(tiles, 2), power_of_two).t())
    codes = (tiles / scales.t()[:, :, None]).flatten(1)[:, :K].to(CODE)
    return codes.contiguous(), scales


def quantize_columns(
    x: Tensor, offsets: Tensor, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """[R, K] -> codes [K, P], transposed, and float32 scales [P / 128, K] of tiles of 128 x 1.

    A tile holds rows of one expert.  Codes of padding are 0; here also those past the last expert.
    """
    P = padded_rows(len(x), len(offsets) - 1)
    padded = x.new_zeros(P, x.shape[1], dtype=torch.float32)
    bounds = zip(pairwise(offsets.tolist()), padded_offsets(offsets).tolist(), strict=False)
    for (start, end), first in bounds:
        padded[first : first + end - start] = x[start:end].float()
    tiles = padded.unflatten(0, (-1, BLOCK))
    scales = scales_of(amax(tiles, 1), power_of_two)
    codes = (tiles / scales[:, None]).flatten(0, 1).to(CODE)
    return codes.t().contiguous(), scales


def quantize_weight(
    weight: Tensor, parts: int = 1, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """[N, K] -> codes [N, K] and float32 scales [NB, KB] of blocks of 128 x 128.

    Args:
        parts: matrices of N / parts rows that lie one upon the other (gate and up); blocks start
            anew in each, and NB = parts * ceil(N / parts / 128).
    """
    K = weight.shape[1]
    codes, scales = [], []
    for part in weight.float().chunk(parts):
        tiles = F.pad(part, (0, -K % BLOCK, 0, -len(part) % BLOCK))
        tiles = tiles.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [NB, 128, KB, 128]
        scale = scales_of(amax(tiles, (1, 3)), power_of_two)
        code = (tiles / scale[:, None, :, None]).flatten(0, 1).flatten(1)
        codes.append(code[: len(part), :K].to(CODE))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def block_of(size: int, parts: int, device: torch.device) -> Tensor:
    """int64 [size], the block of each index where blocks start anew in each of `parts`."""
    index, part = torch.arange(size, device=device), size // parts
    return index // part * blocks(part) + index % part // BLOCK


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [R, K], scales [KB, R] -> float32 [R, K]."""
    return codes.float() * scales.t()[:, block_of(codes.shape[1], 1, codes.device)]


def dequantize_columns(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [K, P], scales [P / 128, K] -> float32 [K, P]."""
    return codes.float() * scales.t().repeat_interleave(BLOCK, 1)


def dequantize_weight(
    codes: Tensor, scales: Tensor, row_parts: int = 1, column_parts: int = 1
) -> Tensor:
    """Codes [N, K], scales [NB, KB] -> float32 [N, K]."""
    N, K = codes.shape
    rows = block_of(N, row_parts, codes.device)
    return codes.float() * scales[rows][:, block_of(K, column_parts, codes.device)]


def swiglu(h: Tensor, probs: Tensor) -> Tensor:
    """[R, 2I] (gate, up), float32 [R] -> float32 [R, I]: silu(gate) * up * prob."""
    gate, up = h.float().chunk(2, dim=-1)
    return F.silu(gate) * up * probs[:, None]


def swiglu_backward(grad: Tensor, h: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [R, I] of `swiglu` -> float32 gradients of h [R, 2I] and of probs [R]."""
    gate, up = h.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad, scaled = grad.float(), grad.float() * probs[:, None]
    grad_gate = scaled * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([grad_gate, scaled * silu], dim=-1), (grad * silu * up).sum(-1)


def grouped_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    n_parts: int = 1,
    k_parts: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """out[r] = a[r] @ b[e].T for the rows r of expert e.

    Args:
        a, a_scales: [R, K] and [KB, R], of `quantize_rows`.
        b, b_scales: [E, N, K] and [E, NB, KB], of `quantize_weight`.
        n_parts, k_parts: parts of b's N and K, as there.
    """
    out = torch.zeros(len(a), b.shape[1], dtype=torch.float32, device=a.device)
    rows, bounds = dequantize_rows(a, a_scales), offsets.tolist()
    for e, (start, end) in enumerate(pairwise(bounds)):
        out[start:end] = (
            rows[start:end] @ dequantize_weight(b[e], b_scales[e], n_parts, k_parts).t()
        )
    return out.to(dtype)


def grouped_wgrad(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, grads: list[Tensor]
) -> None:
    """grads[e] += a @ b.T over the rows of expert e.

    Args:
        a, a_scales: [N, P] and [P / 128, N], of `quantize_columns`.
        b, b_scales: [K, P] and [P / 128, K].
        grads: float32 [N, K] of each expert.
    """
    bounds = pairwise(padded_offsets(offsets).tolist())
    for grad, (start, end) in zip(grads, bounds, strict=True):
        lines, tiles = slice(start, end), slice(start // BLOCK, end // BLOCK)
        left = dequantize_columns(a[:, lines], a_scales[tiles])
        grad += left @ dequantize_columns(b[:, lines], b_scales[tiles]).t()
