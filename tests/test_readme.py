"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys

import torch
from launch import ROOT, environment
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM

from r1kern.data.tokenizer import build_demo_tokenizer

TRAINING, OPERATORS = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
)


def test_the_operators_example_runs():
    T, H, V, E = 12, 8, 20, 64
    torch.manual_seed(0)
    names = {
        "hidden": torch.randn(T, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "targets": torch.randint(V, (T,)),
        "old_logp": torch.full((T,), -3.0),
        "ref_logp": torch.full((T,), -3.0),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "sequence_ids": torch.arange(T) // 4,
        "logits": torch.randn(T, E),
        "bias": torch.zeros(E),
        "tokens": torch.randn(T, H),
        "experts": lambda rows: 2 * rows,
    }
    exec(OPERATORS, names)
    assert names["loss"].isfinite() and names["weight"].grad.any()
    # Weights of a token sum to the scale.
    torch.testing.assert_close(names["out"], 2 * 2.5 * names["tokens"])


SMALLER = "prompts_per_step: 4\n  group_size: 4"


def test_the_training_example_runs(tmp_path):
    model = tmp_path / "runs" / "demo" / "sft" / "model"  # where `make demo` leaves it
    tokenizer = build_demo_tokenizer()
    write_tiny_model(model, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(model)
    (tmp_path / "configs").mkdir()
    config = (ROOT / "configs" / "demo.yaml").read_text()
    assert "prompts_per_step: 32\n  group_size: 8\n" in config
    smaller = config.replace("prompts_per_step: 32\n  group_size: 8", SMALLER)
    (tmp_path / "configs" / "demo.yaml").write_text(smaller)
    (tmp_path / "example.py").write_text(TRAINING)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^\S+ \S+e-\d\d$", done.stdout, re.MULTILINE)) == 2, done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "mine" / "model")
