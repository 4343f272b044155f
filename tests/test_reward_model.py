"""Reward models: Bradley-Terry under every layout against transformers, scores, steps, resume."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from launch import TESTS, python, torchrun
from safetensors.torch import load_file, save_file
from tiny_dense import write_tiny_dense
from tiny_model import write_tiny_model
from transformers import AutoModelForSequenceClassification

from r1kern.config import RewardConfig, RewardModel, parse_config
from r1kern.data.dataset import load_preferences
from r1kern.data.reading import Preference, Reading, hold_out
from r1kern.data.stream import Stream
from r1kern.data.tokenizer import build_demo_tokenizer
from r1kern.errors import UserError
from r1kern.hf.config import read_hf_config
from r1kern.hf.scalar_head import describe_scalar_head
from r1kern.report.metrics import read_metrics
from r1kern.report.rollouts import read_rollouts, write_rollouts
from r1kern.rewards.model_terms import add_terms
from r1kern.train.reading_entry import read_reading
from r1kern.types import Completion, Prompt, Rollout, Score, Sequence

WORKER = TESTS / "workers" / "reward_model.py"
# TP,EP,PP,token budget of a micro-batch, on two ranks
LAYOUTS = ["1,1,1,130", "2,1,1,130", "1,2,1,130", "1,1,2,130"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def to_reward_model(folder, seed: int) -> None:
    """The model of a folder with a random scalar head in place of its own."""
    config = describe_scalar_head(json.loads((folder / "config.json").read_text()))
    config["r1kern_reading"] = {"template": "none", "reads": "response"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    generator = torch.Generator().manual_seed(seed)
    hidden = config["hidden_size"]
    tensors["score.weight"] = torch.randn(1, hidden, generator=generator) / hidden**0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_models(root) -> None:
    tokenizer = build_demo_tokenizer()
    ids = dict(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for name in ("deepseek", "base"):
        write_tiny_model(root / name, seed=4, **ids)
    # Sizes of vLLM's CPU attention, which knows no head of 16.
    sizes = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    sizes |= dict(num_hidden_layers=2, tie_word_embeddings=True)
    write_tiny_dense(root / "qwen2", "qwen2", seed=5, **sizes, **ids)
    for name in ("deepseek", "base", "qwen2"):
        tokenizer.save_pretrained(root / name)
    to_reward_model(root / "deepseek", 6)
    to_reward_model(root / "qwen2", 7)


def preferences(
    count: int, seed: int, chosen: str = LETTERS, rejected: str = LETTERS
) -> list[dict]:
    """Responses of random letters of two alphabets, of uneven lengths."""
    draw = random.Random(seed)

    def text(letters):
        return "".join(draw.choices(letters, k=draw.randint(1, 40)))

    return [
        {"problem": f"{seed}.{i}?", "chosen": text(chosen), "rejected": text(rejected)}
        for i in range(count)
    ]


def write_records(path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


RESPONSES = [
    ["<think>first\nsecond\n\nthird</think><answer>42</answer>", "no tags at all", ""],
    ["<think>\nnever closed", "<think>a</think>\n<answer>b\nc</answer>", "x" * 200],
]


def rollouts() -> list[Rollout]:
    return [
        Rollout(
            Prompt(f"{i}", (3, 4), "", "unused", question=f"question {i}", task="general"),
            tuple(Completion((5,), (0.0,), text, "stop") for text in texts),
            0,
            tuple(Score({"format": 1.0}, 0.5) for _ in texts),
        )
        for i, texts in enumerate(RESPONSES)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, data, and what the worker made of them under every layout."""
    root = tmp_path_factory.mktemp("reward")
    write_models(root)
    write_records(root / "pairs.jsonl", preferences(15, 1))
    write_records(root / "eval.jsonl", preferences(7, 2))
    planted = preferences(120, 3, LETTERS[:13], LETTERS[13:])
    for record in planted:  # what is not read must not matter
        record["chosen"] = f"<think>zzzz</think>{record['chosen']}"
        record["rejected"] = f"<think>aaaa</think>{record['rejected']}"
    write_records(root / "planted.jsonl", planted)
    write_rollouts(root / "rollouts.jsonl", rollouts())
    torchrun(2, WORKER, root, *LAYOUTS)
    return root


@pytest.fixture(scope="module")
def results(world) -> dict[str, dict]:
    return {layout: torch.load(world / f"{layout.replace(',', '_')}.pt") for layout in LAYOUTS}


# -- training ---------------------------------------------------------------------------------


class Truth:
    """transformers in float64, unpadded, with torch's AdamW."""

    def __init__(self, folder):
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        self.tokenizer = build_demo_tokenizer()

    def ids(self, problem: str, text: str) -> list[int]:
        encode = self.tokenizer
        return [*encode(problem).input_ids, *encode(text).input_ids, encode.eos_token_id]

    def reward(self, problem: str, text: str) -> torch.Tensor:
        return self.model(torch.tensor([self.ids(problem, text)])).logits[0, 0]

    def margins(self, records: list[dict]) -> torch.Tensor:
        return torch.stack(
            [
                self.reward(r["problem"], r["chosen"]) - self.reward(r["problem"], r["rejected"])
                for r in records
            ]
        )


@pytest.fixture(scope="module")
def truth(world):
    """Metrics and weights of the three updates."""
    truth = Truth(world / "deepseek")
    optimizer = torch.optim.AdamW(
        truth.model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.0
    )
    records = Stream([Row(**r) for r in preferences(15, 1)], 0)
    steps = []
    for _ in range(3):
        margins = truth.margins([dataclasses.asdict(r) for r in records.next(6)])
        loss = -F.logsigmoid(margins).mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        for p in truth.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.stack([p.grad.norm() for p in truth.model.parameters()]).norm()
        optimizer.step()
        steps.append(
            {
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "accuracy": (margins > 0).double().mean().item(),
                "margin": margins.mean().item(),
            }
        )
    truth.model.save_pretrained(world / "truth")
    with torch.no_grad():
        margins = truth.margins(preferences(7, 2))
    after = {
        "eval/loss": -F.logsigmoid(margins).mean().item(),
        "eval/accuracy": (margins > 0).double().mean().item(),
        "eval/margin": margins.mean().item(),
    }
    return {"steps": steps, "after": after, "weights": load_file(world / "truth/model.safetensors")}


@dataclasses.dataclass(frozen=True)
class Row:
    problem: str
    chosen: str
    rejected: str


def test_training_is_that_of_transformers_in_every_layout(results, truth):
    for layout, found in results.items():
        for mine, theirs in zip(found["steps"], truth["steps"], strict=True):
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (layout, name)
        assert found["after"] == pytest.approx(truth["after"], rel=1e-5, abs=1e-6), layout
        assert found["before"] != pytest.approx(found["after"], rel=1e-2)
        assert set(found["weights"]) == set(truth["weights"])
        for name, weight in truth["weights"].items():
            error = (found["weights"][name] - weight).norm() / (weight.norm() + 1e-9)
            assert error < 1e-5, (layout, name)


def test_training_changes_every_weight(results, world):
    before = load_file(world / "deepseek" / "model.safetensors")
    after = results[LAYOUTS[0]]["weights"]
    same = {name for name in before if before[name].equal(after[name])}
    # Of the last layer only the sequences' last tokens count, and few experts have any of them.
    assert {
        n for n in same if "correction_bias" not in n and "layers.2.mlp.experts" not in n
    } == set()


def test_transformers_loads_the_result(results, world):
    saved = AutoModelForSequenceClassification.from_pretrained(world / "trained")
    assert type(saved).__name__ == "DeepseekV3ForSequenceClassification"
    assert saved.config.num_labels == 1
    assert saved.config.r1kern_reading == {"template": "none", "reads": "response"}
    # of the last layout
    assert saved.score.weight.equal(results[LAYOUTS[-1]]["weights"]["score.weight"])


def test_a_planted_preference_is_learnt(world):
    """From a language model's folder; only the summary tells which response is better."""
    first, *_, last = (r for r in read_metrics(world / "learnt") if "eval/accuracy" in r)
    assert first["eval/loss"] == pytest.approx(0.693147, abs=1e-6), "the head begins at 0"
    assert last["eval/accuracy"] > 0.9
    assert last["eval/loss"] < 0.4
    tensors = load_file(world / "learnt" / "model" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["score.weight"].shape == (1, 64)


def test_a_resumed_run_is_the_same_run(world):
    def learning(name):
        records = (r for r in read_metrics(world / name) if "loss" in r)
        return [(r["step"], r["loss"], r["grad_norm"], r["accuracy"]) for r in records]

    assert len(learning("whole")) == 4
    assert learning("parts") == learning("whole")
    parts, whole = (load_file(world / n / "model/model.safetensors") for n in ("parts", "whole"))
    assert all(parts[name].equal(whole[name]) for name in whole)


# -- scoring ----------------------------------------------------------------------------------


SUMMARIES = [["42", "no tags at all", ""], ["", "b\nc", "x" * 200]]


@pytest.fixture(scope="module")
def expected(world) -> list[list[dict]]:
    """Scores by transformers; responses of more than 128 tokens have none."""
    models = {"harmless": Truth(world / "deepseek"), "helpful": Truth(world / "qwen2")}
    texts = {"harmless": RESPONSES, "helpful": SUMMARIES}
    with torch.no_grad():
        return [
            [
                {
                    name: model.reward(f"question {i}", texts[name][i][k]).item()
                    for name, model in models.items()
                    if len(model.ids(f"question {i}", texts[name][i][k])) <= 128
                }
                for k in range(3)
            ]
            for i in range(2)
        ]


def test_scores_are_those_of_transformers_in_every_layout(results, expected):
    assert expected[1][2] == {}
    for layout, found in results.items():
        for mine, theirs in zip(found["scores"], expected, strict=True):
            assert mine == [pytest.approx(t, abs=1e-5) for t in theirs], layout


def test_step_scores_are_the_values_of_the_prefixes(results, expected, world):
    """A line ends with its newline; the last value is the score."""
    models = {"harmless": Truth(world / "deepseek"), "helpful": Truth(world / "qwen2")}
    prefixes = {
        "harmless": [
            [["<think>first\n", "<think>first\nsecond\n"], [], []],
            [[], ["<think>a</think>\n", "<think>a</think>\n<answer>b\n"], None],
        ],
        "helpful": [[[], [], []], [[], ["b\n"], None]],
    }

    def value(model, problem: str, text: str) -> float:
        ids = model.ids(problem, text)[:-1]  # no end of sequence
        with torch.no_grad():
            return model.model(torch.tensor([ids])).logits[0, 0].item()

    for i in range(2):
        for k in range(3):
            wanted = {
                name: [*(value(model, f"question {i}", p) for p in prefixes[name][i][k]), score]
                for name, model in models.items()
                if (score := expected[i][k].get(name)) is not None
            }
            for layout, found in results.items():
                mine = found["step_scores"][i][k]
                assert mine.keys() == wanted.keys(), layout
                for name in wanted:
                    assert mine[name] == pytest.approx(wanted[name], abs=1e-5), (layout, i, k)


# In one process vLLM makes the group of experts with its first engine or never.
VLLM_MODELS = ["deepseek", "qwen2"]


@pytest.fixture(scope="module")
def pooled(world):
    worker = TESTS / "workers" / "pooling.py"
    done = python(worker, world, *VLLM_MODELS)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return {name: read_rollouts(world / f"scored_{name}.jsonl") for name in VLLM_MODELS}


@pytest.mark.parametrize("name", VLLM_MODELS)
def test_vllm_scores_the_exported_folder_alike(pooled, world, name):
    model = Truth(world / name)
    for i, rollout in enumerate(pooled[name]):
        for text, score in zip(RESPONSES[i], rollout.scores, strict=True):
            with torch.no_grad():
                wanted = model.reward(f"question {i}", text).item()
            assert score.terms["reward_model"] == pytest.approx(wanted, abs=1e-4)
            assert score.total == 0.5


def test_terms_are_weighed_and_a_missing_score_is_no_zero():
    graded = rollouts()[:1]
    found = add_terms(
        graded,
        [[{"a": 2.0, "b": -1.0}, {"a": 2.0}, {"a": float("nan"), "b": 1.0}]],
        {"a": 0.25, "b": 2.0},
    )
    good, long, bad = found[0].scores
    assert good == Score({"format": 1.0, "a": 2.0, "b": -1.0}, 0.5 + 0.5 - 2.0)
    assert (long.total, long.terms) == (0.0, {"format": 1.0, "a": 2.0})
    assert "b: too long" in long.failure
    assert (bad.total, bad.terms) == (0.0, {"format": 1.0, "b": 1.0})
    assert "a: scored nan" in bad.failure


# -- reading ----------------------------------------------------------------------------------


@given(st.lists(st.tuples(*3 * [st.text("ab\n <think>/answer", max_size=30)]), max_size=4))
def test_steps_read_the_tokens_that_training_reads(samples):
    tokenizer = build_demo_tokenizer()
    for reads in ("summary", "response"):
        reading = Reading("r1-zero", reads)
        pairs = [(problem, text) for problem, text, _ in samples]
        whole = reading.sequences(pairs, tokenizer)
        for one, (steps, ends), (_, response) in zip(
            whole, reading.steps(pairs, tokenizer) if pairs else [], pairs, strict=True
        ):
            ids = (*steps.prompt_ids, *steps.completion_ids)
            assert ids == (*one.prompt_ids, *one.completion_ids)
            # The value at place n has read n completion tokens, the last one all but the dummy.
            assert ends == sorted(set(ends))
            assert ends[-1] == len(steps.completion_ids) - 1
            text = reading.text(response)
            for end in ends[:-1]:
                read = tokenizer.decode(steps.completion_ids[:end])
                assert text.startswith(read)
                assert read.endswith("\n")
                assert read.splitlines()[-1].strip()


def test_held_out_pairs_share_no_problem_with_the_training_set():
    sequence = Sequence((3, 4), (1,))
    pairs = [Preference(f"{i % 10}", sequence, sequence) for i in range(40)]
    train, held = hold_out(pairs, 0.2, seed=3)
    assert (len(train), len(held)) == (32, 8)
    assert not {p.problem for p in train} & {p.problem for p in held}
    assert hold_out(pairs, 0.0, seed=3) == (pairs, [])
    with pytest.raises(UserError, match=r"held_out=0\.97 of 10 problems"):
        hold_out(pairs, 0.97, seed=3)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"problem": "p", "chosen": "c"}, "pairs.jsonl:2: no field 'rejected'"),
        ({"problem": "p", "rejected": "c"}, "pairs.jsonl:2: no field 'chosen'"),
        ({"chosen": "p", "rejected": "c"}, "pairs.jsonl:2: no field 'problem'"),
        ({"problem": "p", "chosen": ["c"], "rejected": "r"}, "field 'chosen' must be text"),
        ({"problem": "p", "chosen": "c", "rejected": " "}, "field 'rejected' is blank"),
        ({"problem": "p", "chosen": "c", "rejected": "r" * 99}, "response .* the budget is 90"),
        ({"problem": "p", "chosen": "c" * 60, "rejected": "r" * 60}, "pair .* the budget is 100"),
    ],
)
def test_a_bad_record_is_named(tmp_path, line, told):
    write_records(tmp_path / "pairs.jsonl", [*preferences(1, 1), line])
    with pytest.raises(UserError, match=told) as error:
        load_preferences(
            tmp_path / "pairs.jsonl",
            tokenizer=build_demo_tokenizer(),
            reading=Reading("none", "response"),
            max_tokens=90,
            max_pair_tokens=100,
        )
    assert "\n" not in str(error.value)


def test_long_pairs_are_dropped_where_that_is_wished(tmp_path, caplog):
    records = preferences(3, 1)
    records[1]["chosen"] = "c" * 91
    records[2] |= {"chosen": "c" * 60, "rejected": "r" * 60}
    write_records(tmp_path / "pairs.jsonl", records)
    kept = load_preferences(
        tmp_path / "pairs.jsonl",
        tokenizer=build_demo_tokenizer(),
        reading=Reading("none", "response"),
        max_tokens=90,
        max_pair_tokens=100,
        overlong="drop",
    )
    assert [pair.problem for pair in kept] == ["1.0?"]
    assert [r.getMessage() for r in caplog.records] == [
        "dropped 1 of 3 responses over 90 tokens",
        "dropped 1 of 2 pairs over 100 tokens",
    ]


def test_two_held_out_sets_are_refused():
    raw = {"model": {"path": "m"}, "data": {"train": "d", "eval": "e", "held_out": 0.1}}
    with pytest.raises(UserError, match=r"data\.eval and data\.held_out are two sets"):
        parse_config(RewardConfig, raw)


def test_models_that_are_none_are_refused(tmp_path):
    write_tiny_model(tmp_path)
    with pytest.raises(UserError, match=r"is no reward model \(DeepseekV3ForCausalLM\)"):
        read_reading(RewardModel(path=str(tmp_path)))
    config = describe_scalar_head(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not say how the model reads") as error:
        read_reading(RewardModel(path=str(tmp_path)))
    assert "\n" not in str(error.value)
    assert read_hf_config(tmp_path).num_labels == 1
