"""Options: shipped files load, mistakes are refused with the remedy, all at once."""

from __future__ import annotations

import pytest
from launch import ROOT
from tiny_model import tiny_config

from r1kern.config import (
    EvalConfig,
    JudgeConfig,
    Parallel,
    PipelineConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
    dump_config,
    load_config,
    parse_config,
)
from r1kern.errors import UserError
from r1kern.hf.config import check_layout
from r1kern.hf.layout import stage_layers

MINIMAL = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}


# What a shipped file configures, by how its path below configs/ starts.
KINDS = {
    "demo_sft": SFTConfig,
    "distil/": SFTConfig,
    "eval_": EvalConfig,
    "judge": JudgeConfig,
    "pipeline_": PipelineConfig,
    "ppo_": PPOConfig,
    "reward_": RewardConfig,
    "": TrainConfig,
}
SHIPPED = sorted(
    str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_round_trip(name, tmp_path):
    kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
    config = load_config(kind, ROOT / "configs" / name)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(kind, tmp_path / "again.yaml") == config


def test_paper_defaults():
    config = parse_config(TrainConfig, MINIMAL)
    assert (config.grpo.clip_low, config.grpo.clip_high, config.grpo.beta) == (0.2, 0.2, 0.001)
    assert (config.grpo.normalizer, config.grpo.advantage_std) == ("sequence", "population")
    assert (config.eval.temperature, config.eval.top_p) == (0.6, 0.95)


def test_overrides_reach_nested_keys_and_read_yaml_values(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {train: d.jsonl}\n")
    changes = ["optim.lr=1e-6", "data.where={kind: [add]}", "parallel.tp=2", "grpo.beta=0"]
    config = load_config(TrainConfig, path, changes)
    assert config.optim.lr == 1e-6
    assert config.data.where == {"kind": ["add"]}
    assert config.parallel.tp == 2
    assert config.grpo.beta == 0.0


def refused(raw: dict, kind=TrainConfig) -> str:
    with pytest.raises(UserError) as error:
        parse_config(kind, raw)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_violations_come_at_once():
    message = refused(
        {
            "model": {"path": "m", "dtyp": "float32"},
            "data": {"train": "d", "max_prompt_tokens": -1},
            "optim": {"lr": "fast"},
            "optimizer": {},
        }
    )
    assert "unknown key 'model.dtyp' (did you mean 'dtype'?)" in message
    assert "unknown key 'optimizer' (did you mean 'optim'?)" in message
    assert "data.max_prompt_tokens" in message
    assert "optim.lr" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollout": {"max_tokens": 9999}}, "raise it or shorten"),
        ({"rollout": {"temperature": 0}}, "use 1.0"),
        ({"rollout": {"group_size": 1}}, "greater than or equal to 2"),
        ({"grpo": {"updates_per_batch": 5}}, "does not divide"),
        ({"grpo": {"normalizer": "sum"}}, "'sequence', 'token' or 'constant'"),
        ({"train": {"tokens_per_microbatch": 100}}, "raise it"),
    ],
)
def test_values_that_cannot_work(change, words):
    assert words in refused({**MINIMAL, **change})


def test_a_file_that_is_missing_or_not_yaml(tmp_path):
    (tmp_path / "good.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"did you mean good\.yaml"):
        load_config(TrainConfig, tmp_path / "god.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(TrainConfig, tmp_path / "good.yaml")
    with pytest.raises(UserError, match=r"not section\.key=value"):
        load_config(TrainConfig, ROOT / "configs" / "demo.yaml", ["optim.lr"])


def test_an_impossible_layout_is_refused_with_every_reason():
    with pytest.raises(UserError) as error:
        check_layout(tiny_config(), Parallel(tp=3, ep=5, pp=4, generator_tp=8), world_size=7)
    message = str(error.value)
    for reason in (
        "parallel.tp=3 does not divide num_attention_heads=4 (try 2)",
        "parallel.ep=5 does not divide n_routed_experts=16 (try 4)",
        "parallel.pp=4 exceeds num_hidden_layers=3 (try 3)",
        "parallel.generator_tp=8 does not divide num_attention_heads=4 (try 4)",
        "tp*pp=12 does not divide the world size 7 (start 12 processes",
    ):
        assert reason in message
    assert "\n" not in message


def test_a_possible_layout_passes():
    check_layout(tiny_config(), Parallel(tp=2, ep=4, pp=3, generator_tp=2), world_size=12)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"pp": 2, "layers": [2, 2]}, "must be 2 numbers (parallel.pp) that add up to"),
        ({"pp": 2, "layers": [3]}, "num_hidden_layers=3 (try [2, 1])"),
        ({"world_size": 8}, "parallel.world_size=8 but the job has 4 processes (start 8"),
    ],
)
def test_stages_and_worlds_that_do_not_fit(parallel, words):
    with pytest.raises(UserError) as error:
        check_layout(tiny_config(), Parallel(**parallel), world_size=4)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [
        (61, 16, [3, *[4] * 14, 2]),  # DeepSeek-V3
        (61, 12, [5, 6, 6, *[5] * 8, 4]),
        (4, 2, [2, 2]),
        (3, 2, [2, 1]),
        (5, 4, [1, 1, 2, 1]),
        (1, 1, [1]),
    ],
)
def test_the_default_split_spares_the_first_and_last_stage(layers, stages, split):
    assert stage_layers(layers, Parallel(pp=stages)) == split


def test_every_default_split_is_whole():
    for layers in range(1, 70):
        for stages in range(1, layers + 1):
            split = stage_layers(layers, Parallel(pp=stages))
            assert sum(split) == layers
            assert len(split) == stages
            assert min(split) >= 1
            assert split[0] <= max(split[1:-1], default=layers)
            assert split[-1] <= max(split[1:-1], default=layers)
