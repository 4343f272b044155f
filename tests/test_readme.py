"""The README's Python example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys

from launch import ROOT, environment
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM

from r1kern.data.tokenizer import build_demo_tokenizer


def test_the_python_example_runs(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    model = tmp_path / "runs" / "demo" / "sft" / "model"  # where `make demo` leaves it
    tokenizer = build_demo_tokenizer()
    write_tiny_model(model, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(model)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "example.py").write_text(program)
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
