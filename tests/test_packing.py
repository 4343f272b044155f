"""Packing: every sequence once, within the budget, even in FLOPs; the exact FLOPs themselves."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen2Config

from r1kern import _C
from r1kern.errors import UserError
from r1kern.hf.flops import ModelFlops, sequence_flops
from r1kern.train.packing import balance, imbalance, pack, plan_batches
from r1kern.types import Sequence

V3 = DeepseekV3Config()  # the published sizes

lengths = st.lists(st.integers(1, 400), max_size=60)


def sequence(prompt: int, completion: int, first: int = 0) -> Sequence:
    return Sequence(
        tuple(range(first, first + prompt)), tuple(range(first + 50, first + 50 + completion))
    )


def flops_of(rows) -> np.ndarray:
    rows = np.array(rows, dtype=np.int64)
    return ModelFlops.of(V3).sequence(rows, rows).astype(np.float64)


def loads_of(turns, values) -> np.ndarray:
    return np.array([[values[b].sum() for b in turn] for turn in turns])


@given(lengths=lengths, budget=st.integers(400, 2000), dp=st.integers(1, 5))
def test_every_sequence_once_within_the_budget_and_no_worse_than_by_rows(lengths, budget, dp):
    rows, costs = np.array(lengths, dtype=np.int64), flops_of(lengths)
    turns = balance(rows, costs, budget, dp)
    assert [len(turn) for turn in turns] == [dp] * max(1, len(turns))
    packed = np.concatenate([b for turn in turns for b in turn])
    assert sorted(packed.tolist()) == list(range(len(lengths)))
    assert loads_of(turns, rows).max() <= budget
    fewest = int(_C.pack_ffd(rows, budget).max(initial=-1)) + 1
    assert len(turns) == max(1, -(-fewest // dp))
    by_rows = balance(rows, rows.astype(np.float64), budget, dp)
    assert imbalance(loads_of(turns, costs)) <= imbalance(loads_of(by_rows, costs)) + 1e-12
    again = np.concatenate([b for turn in balance(rows, costs, budget, dp) for b in turn])
    assert again.tolist() == packed.tolist()


def test_long_and_short_sequences_are_balanced_by_flops():
    """Equal rows are far from equal FLOPs where attention dominates."""
    rows = np.array([*[32768] * 3, *[512] * 400], dtype=np.int64)
    costs = flops_of(rows)
    by_rows = balance(rows, rows.astype(np.float64), 131072, 4)
    turns = balance(rows, costs, 131072, 4)
    assert imbalance(loads_of(by_rows, costs)) > 0.06
    assert imbalance(loads_of(turns, costs)) < 0.01


def test_the_ranks_of_a_turn_cost_alike():
    rows = np.random.default_rng(0).lognormal(7.3, 1.0, 512).clip(10, 16384).astype(np.int64)
    costs = flops_of(rows)
    turns = balance(rows, costs, 16384, 8)
    assert imbalance(loads_of(turns, costs)) < 0.04
    assert loads_of(turns, costs).max(1).tolist() == sorted(loads_of(turns, costs).max(1))[::-1]


def test_a_plan_of_8192_sequences_is_fast():
    rng = np.random.default_rng(0)
    sequences = [
        sequence(100, int(n)) for n in rng.lognormal(6.0, 1.0, 8192).clip(1, 8000).astype(int)
    ]
    started = time.perf_counter()
    plan = plan_batches(sequences, budget=8192, dp=32, hf=V3)
    assert time.perf_counter() - started < 1.0
    assert plan.waste()["pack/imbalance"] < 0.05


@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12))
def test_packing_shifts_tokens_and_places_completions(sizes):
    sequences = [sequence(p, c, 100 * i) for i, (p, c) in enumerate(sizes)]
    seen = []
    for rank in range(2):
        for batch in pack(sequences, budget=64, dp=2, dp_rank=rank, multiple=4, hf=V3):
            assert batch.tokens.numel() % 4 == 0
            assert batch.tokens.numel() >= 4
            grid = batch.grid(batch.targets.float())
            for b, (start, end) in enumerate(
                zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
            ):
                if b == len(grid):
                    continue  # the padding sequence
                completion = tuple(grid[b][batch.mask[b].bool()].int().tolist())
                tokens = batch.tokens[start:end].tolist()
                prompt = tokens[: len(tokens) - len(completion) + 1]
                assert batch.positions[start:end].tolist() == list(range(end - start))
                assert tokens == [*prompt, *completion[:-1]]
                seen.append((tuple(prompt), completion))
    assert sorted(seen) == sorted((s.prompt_ids, s.completion_ids) for s in sequences)


def test_waste_is_what_the_micro_batches_hold():
    sequences = [sequence(2, n) for n in (5, 9, 30, 1, 17)]
    plan = plan_batches(sequences, budget=32, dp=2, multiple=4, hf=V3)
    batches = [b for rank in range(2) for b in plan.batches(rank)]
    rows, real = sum(b.tokens.numel() for b in batches), sum(map(len, sequences))
    costs = np.array(
        [[_cost(b) for b in plan.batches(rank)] for rank in range(2)], dtype=np.float64
    )
    assert plan.waste() == {
        "pack/padding": pytest.approx((rows - real) / rows),
        "pack/imbalance": pytest.approx(costs.max(0).sum() / costs.mean(0).sum() - 1),
    }


def _cost(batch) -> int:
    lengths = batch.cu_seqlens.diff()[: len(batch.mask)].tolist()
    counts = batch.mask.sum(1).int().tolist()
    return sum(sequence_flops(V3, n, c) for n, c in zip(lengths, counts, strict=True))


def test_a_sequence_over_the_budget_is_refused():
    with pytest.raises(UserError, match=r"40 tokens exceeds train\.tokens_per_microbatch=39"):
        pack([sequence(1, 40)], budget=39, dp=1, dp_rank=0)


def test_bins_of_even_cost():
    lengths, costs = np.array([4, 4, 4, 4]), np.array([8.0, 1.0, 3.0, 3.0])
    assert _C.pack_even(lengths, costs, 12, 2).tolist() == [0, 1, 1, 1]
    assert _C.pack_even(lengths, costs, 8, 2).tolist() == [0, 0, 1, 1]
    assert _C.pack_even(lengths, costs, 7, 2).tolist() == []
    with pytest.raises(ValueError, match="more than the budget of 3"):
        _C.pack_even(lengths, costs, 3, 2)
    with pytest.raises(ValueError, match="the same size"):
        _C.pack_even(lengths, costs[:2], 12, 2)


def deepseek(**sizes):
    return tiny_config(experts_implementation="eager", **sizes)  # the one torch can count


def qwen():
    return Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )


@pytest.mark.parametrize("config", [deepseek(), deepseek(q_lora_rank=None), qwen()])
def test_flops_are_those_torch_counts(config):
    """transformers computes all L^2 pairs where the causal half counts L (L + 1) / 2."""
    flops, L = ModelFlops.of(config), 12
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(L)[None], use_cache=False)
    unseen = flops.pair * (L * L - L * (L + 1) // 2)
    assert flops.sequence(L, L) + unseen == counter.get_total_flops()
    assert sequence_flops(config, L, L) - sequence_flops(config, L) == flops.head * L


def test_flops_of_deepseek_v3():
    """37 billion active parameters (arXiv 2412.19437), embedding apart, two operations each."""
    flops = ModelFlops.of(V3)
    active = flops.token / 2 + flops.head / 2
    assert active == pytest.approx(36.6e9, rel=0.01)
