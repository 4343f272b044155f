import numpy as np
from numpy.typing import NDArray

def pack_ffd(lengths: NDArray[np.integer], budget: int) -> NDArray[np.int64]: ...
def pack_even(
    lengths: NDArray[np.integer], costs: NDArray[np.floating], budget: int, bins: int
) -> NDArray[np.int64]: ...

# Below, tensors are addresses of contiguous memory (csrc/*.h has their shapes); itemsize is 4 or
# 8, of the FP8 functions 2 or 4.

def logits_stats(
    itemsize: int, z: int, n: int, V: int, stride: int, columns: int, stats: int, threads: int
) -> None: ...
def dlogits(
    itemsize: int,
    z: int,
    V: int,
    stride: int,
    live: int,
    m: int,
    columns: int,
    shift: int,
    c0: int,
    c1: int,
    g: int,
    threads: int,
) -> None: ...
def route(
    itemsize: int,
    logits: int,
    bias: int,
    T: int,
    E: int,
    groups: int,
    topk_groups: int,
    K: int,
    R: int,
    align: int,
    scale: float,
    normalize: bool,
    weights: int,
    indices: int,
    counts: int,
    offsets: int,
    slots: int,
    order: int,
    score_sums: int,
    threads: int,
) -> None: ...
def permute(x: int, order: int, R: int, K: int, bytes: int, rows: int, threads: int) -> None: ...
def unpermute(
    itemsize: int,
    rows: int,
    slots: int,
    weights: int,
    T: int,
    K: int,
    H: int,
    y: int,
    threads: int,
) -> None: ...
def unpermute_backward(
    itemsize: int,
    grad: int,
    rows: int,
    slots: int,
    weights: int,
    T: int,
    K: int,
    H: int,
    grad_rows: int,
    grad_weights: int,
    threads: int,
) -> None: ...
def prefer_huge_pages(start: int, bytes: int) -> None: ...
def fp8_quantize(
    itemsize: int,
    x: int,
    R: int,
    K: int,
    offsets: int,
    E: int,
    power_of_two: bool,
    row_codes: int,
    row_scales: int,
    row_scale_stride: int,
    column_codes: int,
    column_scales: int,
    threads: int,
) -> None: ...
def fp8_swiglu(
    itemsize: int,
    h: int,
    probs: int,
    R: int,
    K: int,
    offsets: int,
    E: int,
    power_of_two: bool,
    row_codes: int,
    row_scales: int,
    row_scale_stride: int,
    column_codes: int,
    column_scales: int,
    threads: int,
) -> None: ...
def fp8_swiglu_backward(
    itemsize: int,
    grad: int,
    h: int,
    probs: int,
    R: int,
    K: int,
    offsets: int,
    E: int,
    power_of_two: bool,
    row_codes: int,
    row_scales: int,
    row_scale_stride: int,
    column_codes: int,
    column_scales: int,
    grad_probs: int,
    threads: int,
) -> None: ...
def fp8_quantize_weight(
    itemsize: int,
    w: int,
    N: int,
    K: int,
    parts: int,
    power_of_two: bool,
    codes: int,
    codes_t: int,
    scales: int,
    threads: int,
) -> None: ...
def fp8_dequantize(
    codes: int,
    scales: int,
    N: int,
    K: int,
    stride: int,
    height: int,
    row_parts: int,
    column_parts: int,
    scale_stride0: int,
    scale_stride1: int,
    out: int,
    threads: int,
) -> None: ...
