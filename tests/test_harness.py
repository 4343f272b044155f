"""lm-eval's own tasks from local files through our generator, against transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from launch import environment, python
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM

from r1kern.data.tokenizer import build_demo_tokenizer, load_tokenizer

SHIPPED = Path(lm_eval.__file__).parent / "tasks"
ROWS = {
    "gsm8k": [
        {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a, b in ((3, 4), (17, 5), (20, 22))
    ],
    "arithmetic": [
        {"context": f"Question: What is ({a} + {b}) * 2?\nAnswer:", "completion": f" {2 * (a + b)}"}
        for a, b in ((9, 8), (2, 3), (7, 7))
    ],
    "wikitext": [{"page": "A page of words that is read in windows. " * 9}, {"page": "Short."}],
}
YAMLS = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "arithmetic": "arithmetic/arithmetic_1dc.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for name, rows in ROWS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = {split: str(file) for split in ("train", "validation", "test")}
        (folder / f"{name}.yaml").write_text(
            f"include: {SHIPPED / YAMLS[name]}\ntask: {name}_local\ntag: null\n"
            f"dataset_path: json\ndataset_name: null\nnum_fewshot: 0\n"
            f"dataset_kwargs: {json.dumps({'data_files': splits})}\n"
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    write_tiny_model(root / "model", seed=0, vocab_size=104)
    build_demo_tokenizer().save_pretrained(root / "model")
    write_tasks(root / "tasks")
    return root


@pytest.fixture(scope="module")
def outcome(root) -> dict:
    out = root / "out" / "scores.json"
    names = ",".join(f"{name}_local" for name in ROWS)
    done = python(
        *("-m", "r1kern", "lm-eval", root / "model", "--tasks", names),
        *("--include-path", root / "tasks", "--max-tokens", 40, "--out", out),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "arithmetic_local acc,none: " in done.stdout
    assert "gsm8k_local exact_match,strict-match: " in done.stdout
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def judge(root):
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(root / "model")

    @torch.no_grad()
    def logps(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return tokenizer, logps


def test_loglikelihood_is_transformers(outcome, judge):
    tokenizer, logps = judge
    samples = outcome["samples"]["arithmetic_local"]
    assert len(samples) == len(ROWS["arithmetic"])
    for sample in samples:
        context, continuation = sample["arguments"][0]
        before = tokenizer.encode(context)
        ids = tokenizer.encode(context + continuation)
        table = logps(ids)[len(before) - 1 : -1]
        target = torch.tensor(ids[len(before) :])
        logp, greedy = sample["resps"][0][0]
        assert float(logp) == pytest.approx(table.gather(1, target[:, None]).sum().item(), abs=1e-3)
        assert str(greedy) == str(bool((table.argmax(-1) == target).all()))


def test_rolling_loglikelihood_is_transformers_by_windows(outcome, judge):
    tokenizer, logps = judge
    for sample in outcome["samples"]["wikitext_local"]:
        ids = tokenizer.encode(sample["arguments"][0][0])
        width, total = 254, 0.0  # the model's 256, less the one generated and the one predicted
        for start in range(0, len(ids), width):
            stop = min(start + width, len(ids))
            # the first window follows the end-of-sequence token, a later one is a full one
            window = [tokenizer.eos_token_id, *ids][max(0, stop - width) : stop + 1]
            table = logps(window)[-(stop - start) - 1 : -1]
            total += table.gather(1, torch.tensor(ids[start:stop])[:, None]).sum().item()
        answer = sample["resps"][0][0]
        assert float(answer[0] if isinstance(answer, list) else answer) == pytest.approx(
            total, abs=2e-3
        )


def test_completions_are_transformers_greedy_ones_cut_at_the_stops(outcome, judge):
    tokenizer, logps = judge
    for sample in outcome["samples"]["gsm8k_local"]:
        context, options = sample["arguments"][0]
        assert "Question:" in options["until"]
        ids = tokenizer.encode(context)
        start = len(ids)
        while len(ids) - start < 40 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(logps(ids)[-1].argmax()))
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        if "<think>" in text or "</think>" in text:
            text = text.partition("</think>")[2].strip()
        for stop in options["until"]:
            text = text.split(stop)[0]
        assert sample["resps"][0][0] == text


def test_reasoning_is_taken_off_before_the_stops_cut():
    from r1kern.eval.harness import _summary, _until

    text = "<think>Question: how?\n\nSo.</think>\n<answer>4</answer>"
    assert _until(_summary(text), ["Question:", "\n\n", ""]) == "4"
    assert _until(_summary("4\nQuestion: next"), ["Question:"]) == "4\n"
    assert _summary("<think>never closed") == ""


def lm_eval_command(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """In a fresh interpreter: libraries read their variables while they are imported."""
    return subprocess.run(
        [sys.executable, "-m", "r1kern", "lm-eval", *map(str, arguments)],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.full
def test_bad_input_is_one_line_with_a_remedy(root, tmp_path):
    blocker = tmp_path / "lm_eval.py"
    blocker.write_text("raise ImportError('No module named lm_eval')\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    model = root / "model"
    cases = [
        (("--tasks", "gsm8kk"), {}, r"has no task 'gsm8kk': did you mean 'gsm8k'\?"),
        (("--tasks", "gsm8k", "--include-path", "nowhere"), {}, "nowhere is no folder"),
        (("--tasks", "gsm8k"), {}, "data of lm-eval's task 'gsm8k' cannot be read .* --hub"),
        (("--tasks", "gsm8k"), {"PYTHONPATH": path}, r"pip install 'r1kern\[eval\]'"),
    ]
    for arguments, variables, message in cases:
        done = lm_eval_command(model, *arguments, **variables, HF_HOME=os.fspath(tmp_path / "hub"))
        assert done.returncode == 2, done.stdout + done.stderr
        assert re.fullmatch(rf"r1kern: error: .*{message}.*", done.stderr.strip()), done.stderr
