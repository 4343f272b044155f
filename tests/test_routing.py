"""The router and the permutation against float64 truth and transformers."""

import pytest
import torch
from truth import BF16, F32, F64, V3, assert_as_good, route_inputs

from r1kern import ops
from r1kern.kernels import reference

LAYOUTS = {
    "deepseek-v3": (256, V3),
    "tiny": (8, {"num_groups": 2, "topk_groups": 1, "topk": 2}),
    "one group": (7, {"num_groups": 1, "topk_groups": 1, "topk": 3, "scale": 0.5}),
    "raw weights": (12, {"num_groups": 3, "topk_groups": 2, "topk": 4, "normalize": False}),
    "every group": (6, {"num_groups": 6, "topk_groups": 6, "topk": 6}),
}


def route_results(function, logits, bias, **layout):
    logits = logits.detach().requires_grad_()
    indices, weights, counts, *_ = function(logits, bias, **layout)
    g = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    (grad,) = torch.autograd.grad((weights * g.to(weights.dtype)).sum(), logits)
    return indices, counts, [weights.detach(), grad]


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("T", [0, 1, 50])
@pytest.mark.parametrize(("E", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_route_against_reference(poisoned, E, layout, T, dtype):
    logits, bias = route_inputs(T, E, dtype)
    indices, counts, got = route_results(ops.route, logits, bias, **layout)
    _, _, plain = route_results(reference.route, logits, bias, **layout)
    expected, expected_counts, truth = route_results(
        reference.route, logits.double(), bias.double(), **layout
    )
    assert torch.equal(indices, expected) and torch.equal(counts, expected_counts)
    assert got[0].dtype == torch.promote_types(dtype, F32) and got[1].dtype == dtype
    assert counts.dtype == indices.dtype == torch.int64
    assert_as_good(got, plain, truth)


@pytest.mark.parametrize(("E", "layout"), list(LAYOUTS.values())[:4], ids=list(LAYOUTS)[:4])
def test_route_against_transformers(E, layout):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=E,
        n_group=layout["num_groups"],
        topk_group=layout["topk_groups"],
        num_experts_per_tok=layout["topk"],
        routed_scaling_factor=layout.get("scale", 1.0),
        norm_topk_prob=layout.get("normalize", True),
    )
    router = DeepseekV3TopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    for centre in (0.0, -5.0, 5.0):  # a mask of 0 in place of -inf would show at -5
        router.e_score_correction_bias.normal_(centre, 0.3)
        hidden = torch.randn(64, 16)
        logits, weights, experts = router(hidden)
        got = ops.route(logits, router.e_score_correction_bias, **layout)
        order = experts.argsort(1)
        mine = got.indices.argsort(1)
        assert torch.equal(got.indices.gather(1, mine), experts.gather(1, order))
        assert torch.equal(got.counts, torch.bincount(experts.flatten(), minlength=E))
        torch.testing.assert_close(got.weights.gather(1, mine), weights.gather(1, order))
        g = torch.randn(64, E)
        grads = [
            torch.autograd.grad((w * g.gather(1, i)).sum(), logits, retain_graph=True)[0]
            for w, i in ((got.weights, got.indices), (weights, experts))
        ]
        torch.testing.assert_close(*grads)


def test_route_by_hand():
    p = torch.tensor([[0.5, 0.4, 0.6, 0.1]], dtype=F64)
    layout = {"num_groups": 2, "topk_groups": 1, "topk": 2, "scale": 3.0}
    got = ops.route(p.logit(), torch.zeros(4), **layout)  # groups score 0.9 and 0.7
    assert got.indices.tolist() == [[0, 1]] and got.counts.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(got.weights, torch.tensor([[3 * 5 / 9, 3 * 4 / 9]], dtype=F64))
    got = ops.route(p.logit(), torch.tensor([0.0, 0, 0, 0.7]), **layout)  # 0.9 and 0.6 + 0.8
    assert got.indices.tolist() == [[3, 2]]
    torch.testing.assert_close(got.weights, torch.tensor([[3 * 1 / 7, 3 * 6 / 7]], dtype=F64))


def test_of_equal_experts_the_lowest_index_wins():
    got = ops.route(torch.zeros(3, 64), torch.zeros(64), **V3 | {"topk": 20})
    assert torch.equal(got.indices, torch.arange(20).expand(3, 20))
    bias = torch.zeros(64)
    bias[40:] = 1.0
    got = ops.route(torch.zeros(3, 64), bias, num_groups=8, topk_groups=4, topk=26)
    assert torch.equal(
        got.indices, torch.cat([torch.arange(40, 64), torch.tensor([0, 1])]).expand(3, -1)
    )


def test_the_bias_never_touches_the_weights():
    """(score + bias) - bias in float32 would lose small scores altogether."""
    logits, _ = route_inputs(20, 8)
    logits -= 18
    for bias in (torch.full((8,), 1e4), torch.full((8,), -1e4)):
        got = ops.route(logits, bias, num_groups=1, topk_groups=1, topk=3, normalize=False)
        scores = logits.sigmoid().gather(1, got.indices)
        torch.testing.assert_close(got.weights, scores, rtol=1e-6, atol=0)


def test_route_of_strided_logits():
    logits, bias = route_inputs(40, 16)
    layout = {"num_groups": 4, "topk_groups": 2, "topk": 3}
    for strided in (
        logits[::2],
        logits.t().contiguous().t(),
        torch.cat([logits, logits], 1)[:, :16],
    ):
        indices, counts, got = route_results(ops.route, strided, bias, **layout)
        expected = route_results(ops.route, strided.contiguous(), bias, **layout)
        assert torch.equal(indices, expected[0]) and torch.equal(counts, expected[1])
        torch.testing.assert_close(got, expected[2])


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("T", [0, 1, 50, 700])
@pytest.mark.parametrize("align", [1, 8, 128])
@pytest.mark.parametrize(("E", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout_and_score_sums(poisoned, E, layout, align, T, dtype):
    logits, bias = route_inputs(T, E, dtype)
    got = ops.route(logits, bias, align=align, **layout)
    offsets, slots, order = reference.layout(got.indices, E, align)
    for mine, expected in ((got.offsets, offsets), (got.slots, slots), (got.order, order)):
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)
    plain, truth = (
        reference.route(x, b, align=align, **layout)[-1]
        for x, b in ((logits, bias), (logits.double(), bias.double()))
    )
    assert_as_good([got.score_sums], [plain], [truth])


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_of_weights_and_score_sums_together(dtype, normalize):
    logits, bias = route_inputs(40, 16, dtype)
    layout = {"num_groups": 4, "topk_groups": 2, "topk": 3, "normalize": normalize}
    w, s = torch.randn(40, 3, dtype=F64), torch.randn(16, dtype=F64)

    def grad(function, x):
        x = x.detach().requires_grad_()
        out = function(x, bias.to(x.dtype), **layout)
        scalar = (out[1] * w.to(out[1].dtype)).sum() + (out[6] * s.to(out[6].dtype)).sum()
        return torch.autograd.grad(scalar, x)

    assert_as_good(
        grad(lambda *a, **k: tuple(ops.route(*a, **k)), logits),
        grad(reference.route, logits),
        grad(reference.route, logits.double()),
    )


def test_route_is_the_same_on_any_number_of_threads():
    logits, bias = route_inputs(3000, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.route(logits, bias, **V3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_a_row_of_nan_still_gives_valid_experts():
    logits, bias = route_inputs(3, 16)
    logits[1, 4:] = torch.nan
    got = ops.route(logits, bias, num_groups=4, topk_groups=2, topk=3)
    assert got.indices.min() >= 0 and got.indices.max() < 16
    assert all(len(set(row)) == 3 for row in got.indices.tolist())
    assert got.weights[[0, 2]].isfinite().all() and got.weights[1].isnan().all()


# -------------------------------------------------------------------------- permute, unpermute


def routed(T, align=1, dtype=F32, H=13):
    logits, bias = route_inputs(T, 16)
    routing = ops.route(logits, bias, num_groups=4, topk_groups=2, topk=3, align=align)
    return torch.randn(T, H).to(dtype), routing


@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16, torch.int64])
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("T", [0, 1, 50])
def test_permute_is_bitwise(poisoned, T, align, dtype):
    x, routing = routed(T, align, dtype)
    rows = ops.permute(x, routing)
    assert torch.equal(rows, reference.permute(x, routing.order, 3))
    assert torch.equal(ops.permute(x.t().contiguous().t(), routing), rows)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16])
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("T", [1, 50])
def test_unpermute_and_gradients(poisoned, T, weighted, align, dtype):
    x, routing = routed(T, align, dtype)
    rows = torch.randn(len(routing.order), 13).to(dtype)

    def run(dtype, naive):
        token, row = x.to(dtype).requires_grad_(), rows.to(dtype).requires_grad_()
        weights = routing.weights.detach().double() if dtype == F64 else routing.weights.detach()
        weights = weights.requires_grad_() if weighted else None
        if naive:
            sent = token[routing.order.clamp(min=0).long() // 3] * (routing.order >= 0)[:, None]
            back = reference.unpermute(row, routing.slots, weights)
        else:
            sent = ops.permute(token, routing)
            back = ops.unpermute(row, routing, weights)
        g = torch.arange(1.0, 14).to(dtype)
        scalar = (back * g).sum() + (sent * g * torch.arange(len(sent))[:, None].to(dtype)).sum()
        leaves = [token, row] + [weights] * weighted
        return [back.detach(), *torch.autograd.grad(scalar, leaves)]

    assert_as_good(run(dtype, False), run(dtype, True), run(F64, True))


def test_there_and_back_is_k_times_the_tokens():
    x, routing = routed(50, align=8, dtype=F64)
    torch.testing.assert_close(ops.unpermute(ops.permute(x, routing), routing), 3 * x)
