"""The benchmark's FP8 cases: their routings, what their checks see, their rivals, the targets."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from r1kern.benchmarks import cases_common, cases_fp8, fp8_rivals, kernels, paired, targets
from r1kern.benchmarks.cases_common import label
from r1kern.kernels import fp8_reference as reference

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------- the routings


def test_balanced_routings_are_even():
    assert cases_fp8.rows_per_expert(4096, 64, "balanced") == [8192] * 4  # DeepGEMM's shape
    assert cases_fp8.rows_per_expert(4096, 8, "balanced") == [1024] * 32
    assert sum(cases_fp8.rows_per_expert(5, 1, "balanced")) == 5 * 8


def test_all_tokens_go_to_the_one_hot_expert():
    first, *others = cases_fp8.rows_per_expert(512, 1, "one-hot")
    assert (first, len(others), sum(others)) == (512, 255, 512 * 7)
    assert max(others) - min(others) <= 1
    assert cases_fp8.rows_per_expert(512, 64, "one-hot")[0] == 512 * 64


def test_zipf_routings_are_uneven_and_the_same_every_time():
    counts = cases_fp8.rows_per_expert(1024, 1, "zipf")
    assert sum(counts) == 1024 * 8 and max(counts) <= 1024
    ranked = sorted(counts, reverse=True)
    # One draw takes the i-th with chance 1 / (i * H(256)), H(256) = 6.12: the tail, where eight
    # draws rarely meet, falls as 1 / i.
    assert sum(ranked[60:80]) / sum(ranked[120:160]) == pytest.approx(
        sum(1 / i for i in range(61, 81)) / sum(1 / i for i in range(121, 161)), rel=0.1
    )
    cases_fp8.rows_per_expert.cache_clear()
    assert cases_fp8.rows_per_expert(1024, 1, "zipf") == counts


# ------------------------------------------------------------------------------ what a check sees


def small(name: str):
    case = kernels.CASES[name]
    sizes = dict(T=32, H=256, I=128)
    shape = case.shapes["cpu"][0]
    return case, shape | {axis: n for axis, n in sizes.items() if axis in shape}


def altered(name: str, change):
    """The case with `change` made to the results of its op."""
    case, shape = small(name)
    ours = case.ours
    return replace(case, ours=lambda s, t: change(t, ours(s, t))), shape


def one_code(tensors, results):
    codes, *rest = results
    codes = codes.clone()
    codes.view(torch.uint8).view(-1)[0] ^= 1
    return codes, *rest


def one_scale(tensors, results):
    codes, scales, *rest = results
    scales[1, 3] *= 1 + 1e-6
    return codes, scales, *rest


def tile_of_another(tensors, results):
    """The scales of the tiles are shifted by one."""
    codes, scales, *rest = results
    return codes, scales.roll(1, 1), *rest


def one_block_short(tensors, results):
    a, a_scales, b, b_scales, offsets, *_ = tensors
    left = reference.dequantize_rows(a, a_scales)[:, :128]
    e = int(offsets.diff().argmax())
    right = reference.dequantize_weight(b[e], b_scales[e], 2)[:, :128]
    rows = slice(int(offsets[e]), int(offsets[e + 1]))
    (out,) = results
    out[rows] -= left[rows] @ right.t()
    return (out,)


def without_probs(tensors, results):
    out, grad_rows, grad_probs, *rest = results
    return out, grad_rows, grad_probs * 1.5, *rest


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fp8_quantize", one_code, "codes: 1 of"),
        ("fp8_quantize", one_scale, "scales: 1 of"),
        ("fp8_quantize_weights", one_code, "codes: 1 of"),
        ("fp8_swiglu", tile_of_another, "rows: error"),
        ("fp8_swiglu_backward", tile_of_another, "grad_h by rows: error"),
        ("fp8_grouped_gemm", one_block_short, "product: error"),
        ("fp8_experts", without_probs, "grad_probs: error"),
    ],
)
def test_the_check_sees_a_fault(name, change, words):
    case, shape = altered(name, change)
    assert words in cases_common.check(case, shape, CPU)


def test_the_check_sees_gradients_that_replace_what_was_there():
    case, shape = small("fp8_wgrad")

    def replacing(shape, tensors):
        tensors[5].zero_()
        return case.ours(shape, tensors)

    assert cases_common.check(case, shape, CPU) is None
    assert "gradient: error" in cases_common.check(replace(case, ours=replacing), shape, CPU)


def test_what_no_one_reads_need_not_be_written():
    def unwritten(tensors, results):
        codes, scales, codes_t, scales_t = (x.clone() for x in results)
        end = int(reference.padded_offsets(tensors[-1])[-1])
        codes_t.view(torch.uint8)[:, end:] = 0x7F  # NaN
        scales_t[end // 128 :] = torch.nan
        return codes, scales, codes_t, scales_t

    case, shape = altered("fp8_quantize", unwritten)
    assert cases_common.check(case, shape, CPU) is None


# -------------------------------------------------------------------------------------- the rivals


def emulated_deep_gemm(align: int = 128):
    """DeepGEMM by the contract that its README and tests state, in plain torch."""

    def m_grouped(left, right, out, layout):
        (a, a_scales), (b, b_scales) = left, right
        assert len(a) % align == 0 and layout.dtype == torch.int32 and out.is_contiguous()
        rows = reference.dequantize_rows(a, a_scales.t())
        for e in range(len(b)):
            places = (layout == e).nonzero()[:, 0]
            if len(places):
                assert places[0] % align == 0
                assert int(places[-1] - places[0]) == len(places) - 1
            weight = reference.dequantize_weight(b[e], b_scales[e])
            out[places] = (rows[places] @ weight.t()).to(out.dtype)

    def k_grouped(left, right, out, sizes, layout, added):
        assert layout.tolist() == sizes and not any(size % 128 for size in sizes)
        start = 0
        for e, size in enumerate(sizes):
            sides = []
            for (codes, scales), width in zip((left, right), out.shape[1:], strict=True):
                own = codes[start * width : (start + size) * width].view(width, size)
                tiles = scales.t()[start // 128 : (start + size) // 128]
                sides.append(reference.dequantize_columns(own, tiles))
            out[e] = added[e] + sides[0] @ sides[1].t()
            start += size

    return SimpleNamespace(
        get_mk_alignment_for_contiguous_layout=lambda: align,
        m_grouped_fp8_gemm_nt_contiguous=m_grouped,
        k_grouped_fp8_gemm_nt_contiguous=k_grouped,
    )


@pytest.mark.parametrize("routing", ["zipf", "one-hot"])
@pytest.mark.parametrize(
    ("name", "rival"),
    [
        ("fp8_grouped_gemm", fp8_rivals.deep_gemm_grouped),
        ("fp8_grouped_gemm", fp8_rivals.deep_gemm_with_layout),
        ("fp8_wgrad", fp8_rivals.deep_gemm_wgrad),
        ("fp8_wgrad", fp8_rivals.deep_gemm_wgrad_with_layout),
    ],
)
def test_deep_gemm_gets_its_layouts(monkeypatch, name, rival, routing):
    monkeypatch.setitem(sys.modules, "deep_gemm", emulated_deep_gemm())
    case, shape = small(name)
    case = replace(case, forgiven=1e-5)
    assert cases_common.differs(case, rival("cuda"), shape | dict(routing=routing), CPU) is None


def test_rivals_without_a_kernel_here_say_so():
    case, _ = small("fp8_grouped_gemm")
    for name in ("deepgemm", "torch scaled_grouped_mm rows"):
        with pytest.raises(ImportError, match="no FP8 kernel for a CPU"):
            case.baselines[name]("cpu")


@pytest.mark.parametrize(
    ("name", "rival"),
    [
        ("fp8_grouped_gemm", "torch grouped_mm"),
        ("fp8_wgrad", "torch grouped_mm"),
        ("fp8_experts", "torch grouped_mm"),
    ],
)
def test_bf16_rivals_compute_the_same(name, rival):
    case, shape = small(name)
    shape = shape | dict(dtype="bf16")
    assert cases_common.differs(case, case.baselines[rival]("cpu"), shape, CPU) is None


# ------------------------------------------------------------------------------------- the targets


def rows_that(rate: float, ratios: dict[str, float | None], copy: float) -> list[dict]:
    """A row for every shape of every target."""
    baselines = {
        name: {"absent": "No module"} if ratio is None else {"times_ours": ratio}
        for name, ratio in ratios.items()
    }
    figures = dict(rate=rate, unit="TFLOP/s", percent_of_measured=copy, baselines=baselines)
    row = dict(date="2026-01-01", device="NVIDIA H200", **figures)
    made = {(t.case, label(shape)) for t in targets.targets() for shape in t.shapes}
    return [row | dict(case=case, shape=shape) for case, shape in sorted(made)]


def verdicts(tmp_path, rows) -> list[str]:
    source = tmp_path / "kernels_h200.json"
    source.write_text(json.dumps(rows))
    text = targets.write(source).read_text()
    return [line.split(" | ")[3] for line in text.splitlines()[2:14]]


def test_targets_are_judged_by_the_rows(tmp_path):
    ratios = {"torch": 1.7, "transformer-engine": 1.3, "deepgemm": 1.01}
    assert verdicts(tmp_path, rows_that(1400, ratios, 85)) == ["met"] * 12
    assert verdicts(tmp_path, rows_that(1000, dict.fromkeys(ratios, 0.9), 79)) == ["NOT MET"] * 12
    one_slow = rows_that(1400, ratios, 85)
    slow = next(row for row in one_slow if row["case"] == "fp8_experts")
    slow["baselines"] = slow["baselines"] | {"torch": {"times_ours": 1.59}}
    assert verdicts(tmp_path, one_slow)[10:] == ["NOT MET", "met"]


def test_targets_that_were_not_measured_say_why(tmp_path):
    absent = rows_that(1400, {"torch": 1.7, "transformer-engine": None, "deepgemm": None}, 85)
    told = verdicts(tmp_path, absent)
    assert told[11] == "not measured: transformer-engine: No module"
    assert told.count("met") == 9
    failed = [row | {"failed": "product: error"} for row in absent]
    assert set(verdicts(tmp_path, failed)) == {"not measured: FAILED: product: error"}
    assert set(verdicts(tmp_path, [])) == {"not measured: no row"}
    assert targets.main(["--device", "h100", "--out", str(tmp_path)]) == 2


# -------------------------------------------------------------------------- the numerics over seeds


def test_noise_is_judged_by_pairs_and_by_evaluation():
    def judged(differences, error=0.0):
        rows = []
        for seed, difference in enumerate(differences):
            base = {"seed": seed, "pass@1": 0.1 * seed, "pass@1 error": error}
            rows.append(base | {"precision": "baseline"})
            rows.append(base | {"precision": "fp8", "pass@1": 0.1 * seed + difference})
        return paired.compare(rows, "fp8", "pass@1")

    assert judged([0.01]) is None  # one seed scatters not at all
    steady = judged([0.01, 0.011, 0.012])
    # By hand: deviation 0.001, over root 3, times Student's 4.303 of two degrees.
    assert steady["difference"] == pytest.approx(0.011)
    assert steady["paired_half_interval"] == pytest.approx(4.303 * 0.001 / 3**0.5, rel=1e-3)
    assert not steady["within_noise"]
    assert judged([-0.02, 0.01, 0.012])["within_noise"]
    # Six evaluations with an error of 0.02 each: 1.96 * root 6 * 0.02 / 3 = 0.032.
    assert judged([0.01, 0.011, 0.012], error=0.02)["within_noise"]
    assert not judged([0.04, 0.041, 0.042], error=0.02)["within_noise"]
