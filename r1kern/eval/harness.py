"""lm-eval's tasks through our generator: the benchmarks that we do not grade ourselves.

Differs from lm-eval's own vLLM back end: the chain of thought is taken off before a task sees the
text (the paper judges final summaries, DeepSeek-R1, arXiv 2501.12948, section 3), and stop strings
cut what is left, so that one within the reasoning ends nothing; the generator itself stops at the
end-of-sequence token or the token budget.
"""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from r1kern.errors import UserError
from r1kern.generate import Generator, Sampling
from r1kern.rewards.format import parts
from r1kern.types import Prompt

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"{error}: install lm-eval with `pip install 'r1kern[eval]'`") from None


class HarnessModel(TemplateLM):
    """What lm-eval asks of a model, answered by a `Generator`.

    Args:
        generator: with weights.
        tokenizer: a transformers tokenizer.
        max_length: tokens of a prompt and its completion; longer prompts lose their beginning.
        max_tokens: of a completion, where the task names no budget.
        seed: of the sampling, where the task samples.
    """

    def __init__(
        self, generator: Generator, tokenizer, *, max_length: int, max_tokens: int, seed: int = 0
    ):
        super().__init__()
        self.generator = generator
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_tokens = max_tokens
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:  # a rendered chat has its own
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt=True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The summaries, cut at the stop strings; in order."""
        answers: list[str] = [""] * len(requests)
        alike = defaultdict(list)  # by sampling: a call of the generator has one
        for i, request in enumerate(requests):
            context, options = request.args
            options = normalize_gen_kwargs(dict(options), default_max_gen_toks=self.max_tokens)
            sampling = self._sampling(options)
            ids = self.tok_encode(context)[-(self.max_length - sampling.max_tokens) :]
            until = handle_stop_sequences(options.get("until"), eos=None)
            alike[sampling].append((i, Prompt(str(i), tuple(ids), "", context), until))
        for sampling, group in alike.items():
            rollouts = self.generator.generate([p for _, p, _ in group], sampling, self.seed)
            for (i, _, until), rollout in zip(group, rollouts, strict=True):
                answers[i] = _until(_summary(rollout.completions[0].text), until)
        return answers

    def _sampling(self, options: dict) -> Sampling:
        return Sampling(
            n=1,
            max_tokens=min(int(options["max_gen_toks"]), self.max_length - 1),
            temperature=float(options.get("temperature") or 0.0),
            top_p=float(options.get("top_p", 1.0)),
            stop_ids=(self.eot_token_id,),
            logps=False,
        )

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            assert len(continuation) < self.max_length, "a continuation fills the model's context"
            # one token is generated behind what is scored
            sequences.append((context + continuation)[-(self.max_length - 1) :])
        results = []
        for (_, _, continuation), scored in zip(
            requests, self.generator.score(sequences), strict=True
        ):
            tail = scored[len(scored) - len(continuation) :]
            results.append((sum(logp for logp, _ in tail), all(best for _, best in tail)))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the longest context."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                self.tok_encode(text, False),
                self.prefix_token_id,
                self.max_length - 2,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logp
        return totals


def _summary(text: str) -> str:
    return parts(text).summary if "<think>" in text or "</think>" in text else text


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text


def load_tasks(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """lm-eval's tasks and those of a folder, checked to hold every name.

    Raises:
        UserError: a task is unknown, or the folder is missing.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder: name one with task YAMLs")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)[0]
            raise UserError(f"lm-eval has no task '{name}': did you mean '{near}'?")
    return manager


def load_data(manager: TaskManager, names: Sequence[str]) -> list:
    """The tasks with their data.

    Raises:
        UserError: a data set cannot be read; without `--hub` nothing is fetched.
    """
    tasks = []
    for name in names:
        try:
            tasks += manager.load([name])["tasks"].values()
        except (OSError, ValueError) as error:  # datasets' own are both
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the data of lm-eval's task '{name}' cannot be read ({reason}): point its "
                "dataset_kwargs at a local file in --include-path, or allow --hub"
            ) from None
    return tasks


def evaluate(model: HarnessModel, tasks: list, *, out: Path, **options) -> dict[str, dict]:
    """Runs the tasks; writes scores and samples to `out`, a JSON file.

    Args:
        options: of lm-eval's `simple_evaluate`.

    Returns:
        Its metrics by task.
    """
    results = simple_evaluate(model=model, tasks=tasks, log_samples=True, **options)
    kept = {key: results[key] for key in ("results", "configs", "versions", "n-shot", "samples")}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(kept, indent=1, ensure_ascii=False, default=str))
    return results["results"]
