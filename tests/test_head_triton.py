"""The CUDA head's Triton kernels, run by Triton's interpreter, against float64."""

import math

import pytest
import torch
from interpreter import interpreted

from r1kern.errors import UserError

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(scope="module")
def head():
    with interpreted("head_triton") as module:
        yield module


@pytest.fixture
def poisoned():
    """Every uninitialised allocation is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n, V, H, dtype, seed=0):
    """Logits a few units apart, some of them large; every third target is another shard's."""
    torch.manual_seed(seed)
    hidden = torch.randn(n, H, dtype=F64).to(dtype)
    weight = (torch.randn(V, H, dtype=F64) * 4 / math.sqrt(H)).to(dtype)
    columns = torch.randint(V, (n,))
    columns[::3] = -1
    columns[-1] = V - 1
    return hidden, weight, columns


def stats(z, columns):
    peak = z.amax(1)
    shifted = z - peak[:, None]
    e = shifted.exp()
    found = torch.where(columns >= 0, z.gather(1, columns.clamp(min=0)[:, None])[:, 0], 0)
    return torch.stack([peak, e.sum(1), (e * shifted).sum(1), found])


def assert_stats(got, hidden, weight, columns, inv_temperature):
    """At most 3 times as far from the truth as float32 torch from the same inputs, row by row of
    the result, give or take 8 last places of its greatest element."""
    truth = stats(inv_temperature * hidden.double() @ weight.double().T, columns)
    plain = stats(inv_temperature * (hidden.float() @ weight.float().T), columns)
    assert got.shape == truth.shape and got.dtype == F32
    for x, p, t in zip(got, plain, truth, strict=True):
        allowed = 3 * (p - t).abs().max() + 8 * 2**-24 * t.abs().max()
        assert (x - t).abs().max() <= allowed


# One row; a tile with room on every side; several tiles each way, none of them full at the end.
@pytest.mark.parametrize(
    ("tile", "n", "V", "H", "dtype"),
    [
        ("thin", 1, 1, 8, BF16),
        ("thin", 64, 300, 72, BF16),
        ("thin", 33, 130, 8, F16),
        ("square", 70, 128, 64, BF16),
        ("square", 130, 200, 72, BF16),
        ("wide", 130, 528, 72, BF16),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # float16 of a masked column
def test_stats_and_logits(head, poisoned, monkeypatch, tile, n, V, H, dtype):
    if tile == "wide":
        monkeypatch.setattr(head, "tile_for", lambda *_: "wide")
    assert head.tile_for(n, V, dtype) == tile
    hidden, weight, columns = inputs(n, V, H, dtype)
    logits = torch.full((n, V), math.nan, dtype=dtype)
    got = head.logits_stats(hidden, weight, columns, 1 / 0.6, logits)
    assert_stats(got, hidden, weight, columns, 1 / 0.6)
    z = hidden.double() @ weight.double().T / 0.6
    assert ((logits - z).abs() <= torch.finfo(dtype).eps * 0.51 * z.abs() + 1e-5).all()


def test_the_same_bits_with_and_without_logits(head):
    hidden, weight, columns = inputs(70, 130, 72, BF16)
    logits = torch.empty(70, 130, dtype=BF16)
    got = head.logits_stats(hidden, weight, columns, 1.0)
    assert torch.equal(head.logits_stats(hidden, weight, columns, 1.0, logits), got)


@pytest.mark.parametrize(("n", "V", "H"), [(1, 5, 4), (33, 64, 32), (70, 201, 44)])
def test_float32(head, poisoned, n, V, H):
    hidden, weight, columns = inputs(n, V, H, F32)
    logits = torch.full((n, V), math.nan)
    got = head.logits_stats(hidden, weight, columns, 0.7, logits)
    assert_stats(got, hidden, weight, columns, 0.7)
    z = 0.7 * hidden.double() @ weight.double().T
    plain = 0.7 * (hidden @ weight.T)
    assert (logits - z).abs().max() <= 3 * (plain - z).abs().max() + 1e-6


def test_more_tiles_than_combine_reads_at_once(head, poisoned, monkeypatch):
    monkeypatch.setitem(head.COMBINE, "BT", 4)
    hidden, weight, columns = inputs(17, 9 * 64 + 1, 4, F32)
    assert_stats(head.logits_stats(hidden, weight, columns, 1.0), hidden, weight, columns, 1.0)


def test_more_tiles_of_rows_than_a_group(head, poisoned):
    hidden, weight, columns = inputs(17 * 32 + 1, 65, 4, F32)
    assert_stats(head.logits_stats(hidden, weight, columns, 1.0), hidden, weight, columns, 1.0)


def test_columns_beyond_V_stay_out(head):
    """All logits are far below 0, which is what a padded column would be."""
    hidden, weight = torch.full((3, 8), 30.0, dtype=BF16), torch.full((5, 8), -30.0, dtype=BF16)
    got = head.logits_stats(hidden, weight, torch.tensor([-1, 0, 4]), 1.0)
    expected = [[-7200.0] * 3, [5.0] * 3, [0.0] * 3, [0.0, -7200.0, -7200.0]]
    assert got.tolist() == expected


def test_a_chunk_of_a_longer_buffer(head, poisoned):
    """Rows of wider buffers, as a padded vocabulary has them: nothing beyond V is touched."""
    hidden, weight, columns = inputs(9, 21, 16, BF16)
    wide_hidden, wide_logits = torch.zeros(11, 24, dtype=BF16), torch.zeros(9, 32, dtype=BF16)
    wide_hidden[2:, :16] = hidden
    got = head.logits_stats(wide_hidden[2:, :16], weight, columns, 1.0, wide_logits[:, :21])
    assert_stats(got, hidden, weight, columns, 1.0)
    assert wide_logits[:, :21].all() and not wide_logits[:, 21:].any()


def test_no_rows(head):
    hidden, weight, columns = inputs(1, 7, 8, BF16)
    assert head.logits_stats(hidden[:0], weight, columns[:0], 1.0).shape == (4, 0)
    none = torch.zeros(0)
    head.dlogits_(torch.zeros(0, 7), None, columns[:0], none, none, none, none)
    logits = torch.ones(2, 7)
    two = torch.zeros(2)
    empty = torch.zeros(0, dtype=torch.int64)
    head.dlogits_(logits, empty, torch.zeros(2, dtype=torch.int64), two, two, two, two)
    assert torch.equal(logits, torch.ones(2, 7))


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        (torch.zeros(2, 12, dtype=BF16), torch.zeros(3, 12, dtype=BF16), "hidden.*divisible by 8"),
        (torch.zeros(2, 6), torch.zeros(3, 6), "hidden.*divisible by 4"),
        (torch.zeros(2, 8), torch.zeros(8, 3).T, "weight.*contiguous rows"),
        (torch.zeros(2, 16, dtype=BF16)[:, 1:9], torch.zeros(3, 8, dtype=BF16), "hidden.*16 bytes"),
        (torch.zeros(2, 8, dtype=F64), torch.zeros(3, 8, dtype=F64), "bf16, fp16, fp32, not.*64"),
    ],
)
def test_what_tma_cannot_read_is_refused(head, hidden, weight, message):
    with pytest.raises(UserError, match=message) as error:
        head.logits_stats(hidden, weight, torch.zeros(2, dtype=torch.int64), 1.0)
    assert "\n" not in str(error.value)


def dlogits(z, columns, shift, c0, c1, g):
    shifted = z - shift[:, None]
    dz = shifted.exp() * (c0[:, None] + c1[:, None] * shifted)
    rows = torch.arange(len(z))[columns >= 0]
    dz[rows, columns[rows]] += g[rows]
    return dz


LIVE = {
    "all": lambda n: None,
    "none dropped": lambda n: torch.arange(n),
    "every other": lambda n: torch.arange((n - 1) % 2, n, 2),
    "late": lambda n: torch.arange(n)[-(n // 3) - 1 :],
    "early": lambda n: torch.arange(n)[: n // 3 + 1],
}


@pytest.mark.parametrize("keep", LIVE)
@pytest.mark.parametrize(("n", "V"), [(1, 1), (64, 64), (200, 130)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dlogits(head, keep, n, V, dtype):
    torch.manual_seed(0)
    z = torch.randn(n, V).to(dtype)
    columns = torch.randint(-1, V, (n,))
    shift = z.float().logsumexp(1)
    c0, c1, g = torch.randn(3, n)
    live = LIVE[keep](n)
    m = n if live is None else len(live)
    rows = slice(None) if live is None else live
    truth = dlogits(z.double(), columns, *(x.double() for x in (shift, c0, c1, g)))[rows]
    plain = dlogits(z.float(), columns, shift, c0, c1, g)[rows].to(dtype)
    padded = torch.full((n, V + 3), 7.0, dtype=dtype)
    padded[:, :V] = z
    head.dlogits_(padded[:, :V], live, columns, shift, c0, c1, g)
    got = padded[:m, :V]
    allowed = 3 * (plain - truth).abs().max() + 8 * 2**-24 * truth.abs().max()
    assert (got - truth).abs().max() <= allowed
    assert (padded[:, V:] == 7).all()


@pytest.mark.parametrize("keep", ["all", "every other"])
def test_dlogits_of_more_rows_than_a_span(head, monkeypatch, keep):
    monkeypatch.setattr(head, "SPAN", 64)
    test_dlogits(head, keep, 200, 130, F32)


def test_tiles_by_shape(head):
    assert head.tile_for(1024, 129280, BF16) == "wide"
    assert [head.tile_for(1024, V, BF16) for V in (64640, 32320, 16160)] == ["wide"] * 3
    assert head.tile_for(64, 129280, BF16) == "thin"
    assert head.tile_for(1024, 129281, BF16) == "square"  # stored by elements, `wide` spills
    assert head.tile_for(128, 32000, BF16) == "square"
    assert head.tile_for(1024, 129280, F32) == "exact"
