"""What the tests of blockwise FP8 share: rows by expert, wild numbers, equality in bits."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from r1kern.kernels import fp8_reference as reference

F32, BF16 = torch.float32, torch.bfloat16
COUNTS = ([0, 129, 1, 37, 0], [130], [3, 4], [0, 0, 128], [1] * 5, [0, 0])
"""Rows of each expert: ragged, empty, one expert, one row each, whole tiles, nothing."""

WILD = (0.0, -0.0, 1e38, -3e38, 1e-38, 1e-45, -1e-40, float("nan"), float("inf"), float("-inf"))


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def wild(seed, rows, columns, dtype=F32, spread=20.0, share=0.01):
    """Numbers of all sizes, rows of zeros and of tiny ones, and here and there one of `WILD`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    x *= torch.exp(spread * torch.randn(rows, columns, generator=g))
    x[::5] *= 1e-30
    x[1::7] = 0.0
    odd = torch.rand(rows, columns, generator=g) < share
    pick = torch.randint(len(WILD), (rows, columns), generator=g)
    return torch.where(odd, torch.tensor(WILD)[pick], x).to(dtype)


def shapes():
    """(counts, columns, dtype, power_of_two, seed, spread, share of wild numbers)."""
    return st.tuples(
        st.lists(st.sampled_from([0, 1, 2, 63, 127, 128, 129, 200]), min_size=1, max_size=5),
        st.sampled_from([1, 7, 8, 100, 128, 129, 256, 300]),
        st.sampled_from([F32, BF16]),
        st.booleans(),
        st.integers(0, 99),
        st.sampled_from([0.0, 1.0, 20.0, 40.0]),
        st.sampled_from([0.0, 0.01, 0.3]),
    )


def assert_bits(got, expected):
    """The same bits; of NaN any bits."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    integer = torch.uint8 if got.itemsize == 1 else torch.int32
    nan = got.float().isnan()
    assert torch.equal(nan, expected.float().isnan())
    a, b = (x.contiguous().view(integer).masked_fill(nan, 0) for x in (got, expected))
    assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ"


def both_ways(x, offsets, power_of_two):
    """What `quantize` is to return."""
    rows = reference.quantize_rows(x, power_of_two)
    return *rows, *reference.quantize_columns(x, offsets, power_of_two)


def assert_near(got, expected, offsets):
    """Codes, scales, codes, scales, of arithmetic that may differ in its last bits: at most one of
    10,000 codes is the neighbour of what is expected."""
    used = reference.padded_offsets(offsets)[-1]
    slices = slice(None), slice(None), (slice(None), slice(used)), slice(used // 128)
    for x, y, part in zip(got, expected, slices, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = x[part].contiguous(), y[part].contiguous()
        if x.itemsize == 1:
            apart = (x.view(torch.int8).int() - y.view(torch.int8).int()).abs()
            assert apart.numel() == 0 or apart.max() <= 1
            assert (apart > 0).sum() <= 1 + apart.numel() // 10_000
        elif x.numel():  # where numbers cancel, their last bits are more of the result
            torch.testing.assert_close(x, y, rtol=3e-6, atol=1e-6 * y.max().item())
