"""Every option, typed and frozen: YAML plus dotted overrides, checked before anything is built."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from r1kern.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


RecomputedPart = Literal[
    "full", "core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


C = TypeVar("C", bound=_Section)


class Run(_Section):
    """Where the run lives and how long it may wait."""

    folder: str = "runs/grpo"
    seed: NonNegative = 0
    deadline_s: float = Field(600.0, gt=0)  # for any collective, sync or generation


class Model(_Section):
    """The model in Hugging Face format."""

    path: str  # folder
    init: Literal["load", "random"] = "load"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_positions: Positive = 4096  # longest prompt plus completion
    trust_remote_code: bool = False  # run Python code that comes with tokenizer or model
    attention: Literal["auto", "sdpa", "varlen", "flash"] = "auto"  # auto: the best there is
    transformer_engine: bool = False  # its attention, norms and linears (CUDA)
    mtp_coef: float = Field(0.0, ge=0)  # weight of the multi-token-prediction loss; 0: kept as is

    @model_validator(mode="after")
    def _transformer_engine_fits(self):
        if self.transformer_engine and self.dtype != "bfloat16":
            raise ValueError("transformer_engine attends to packed sequences in bfloat16 only")
        if self.transformer_engine and self.attention != "auto":
            raise ValueError(
                "transformer_engine chooses its attention kernel itself: leave attention at auto"
            )
        return self


class Experts(_Section):
    """Training of the mixture of experts."""

    bias_update_rate: float = Field(0.0, ge=0)  # auxiliary-loss-free balance; 0: bias kept
    balance_coef: float = Field(0.0, ge=0)  # weight of the sequence-level balance loss
    replay: Literal["off", "old_policy", "generator"] = "off"  # whose expert choice is trained

    @model_validator(mode="after")
    def _replay_exists(self):
        if self.replay == "generator":
            raise ValueError(
                "replay = generator is not built (vLLM's enable_return_routed_experts): use "
                "old_policy"
            )
        return self


class Parallel(_Section):
    """Sizes of the parallel groups; data parallelism takes the rest of the world."""

    tp: Positive = 1  # tensor parallel, with sequence parallelism when > 1
    ep: Positive = 1  # expert parallel
    pp: Positive = 1  # pipeline parallel
    layers: list[Positive] = []  # of each pipeline stage; empty: even, first and last lighter
    generator_tp: Positive = 1  # tensor parallel of the vLLM replicas
    world_size: Positive | None = None  # processes the layout is made for; others are refused


class Data(_Section):
    """Problems: `problem` and `answer` (GRPO) or `problem` and `completion` (SFT) per record."""

    train: str  # JSONL file, datasets folder, bundled:NAME or hub:owner/name[:split]
    eval: str | None = None
    template: Literal["r1-zero", "chat", "none"] = "r1-zero"
    max_prompt_tokens: Positive = 1024
    overlong: Literal["error", "drop"] = "error"
    where: dict[str, list[str]] = {}  # keep the records whose field has one of these values


class Sampling(_Section):
    """How completions are drawn."""

    max_tokens: Positive = 1024
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class Rollout(Sampling):
    """Sampling during training."""

    prompts_per_step: Positive = 32
    group_size: Annotated[int, Field(ge=2)] = 16  # G, completions of a prompt


class Generator(_Section):
    """The vLLM engine of each replica."""

    max_seqs: Positive = 256  # completions decoded at the same time
    kv_cache_gib: float = Field(1.0, gt=0)  # per rank
    enforce_eager: bool = True  # false: CUDA graphs for decoding (the trainer has none: ragged)
    sleep: bool = True  # weights and cache leave the GPU while the trainer works (CUDA)
    fp8: bool = False  # weights in 128 x 128 blocks of e4m3 (CUDA)
    sync_bucket_mib: Positive = 1024  # gathered weights in flight during a sync


class GRPO(_Section):
    """The objective; see `ops.grpo_loss` for each term and its source."""

    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    beta: float = Field(0.001, ge=0)  # weight of the KL to the reference model
    kl: Literal["k3", "k3_unbiased", "k2"] = "k3"
    entropy_coef: float = 0.0  # weight of the entropy, added to the objective
    normalizer: Literal["sequence", "token", "constant"] = "sequence"
    ratio: Literal["token", "sequence", "completion"] = "token"
    advantage_std: Literal["population", "sample", "none"] = "population"
    updates_per_batch: Positive = 1  # optimizer steps on one batch of rollouts
    importance_cap: float | None = Field(None, gt=0)  # truncated importance sampling, off
    drop_truncated: bool = False  # leave completions that ran out of tokens out of the loss


class Optim(_Section):
    """AdamW through Megatron's distributed optimizer."""

    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    offload: bool = False  # master weights, moments and the update live in host memory


class Train(_Section):
    """The loop."""

    steps: Positive = 100
    tokens_per_microbatch: Positive = 8192  # packed rows of one micro-batch
    save_every: NonNegative = 50  # 0: at the end only
    keep_last: Positive = 2
    async_save: bool = True  # write checkpoints beside the following steps
    recompute: list[RecomputedPart] = []  # parts computed again in the backward
    offload_in_rollout: bool = True  # gradients and optimizer to host memory meanwhile (CUDA)
    eval_every: NonNegative = 0  # 0: before the first step and after the last only
    mismatch_limit: float = Field(0.0, ge=0)  # stop when |trainer - generator| exceeds it; 0: off


class Eval(Sampling):
    """Held-out pass@1: the mean of `samples` completions a problem (arXiv 2501.12948)."""

    samples: NonNegative = 8  # 0: no evaluation
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


class TrainConfig(_Section):
    """`r1kern train`: GRPO."""

    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout = Rollout()
    generator: Generator = Generator()
    experts: Experts = Experts()
    rewards: dict[str, float] = {"accuracy": 1.0, "format": 1.0}  # weight of each term
    grpo: GRPO = GRPO()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _lengths_fit(self):
        for name, tokens in (("rollout", self.rollout), ("eval", self.eval)):
            longest = self.data.max_prompt_tokens + tokens.max_tokens
            if longest > self.model.max_positions:
                raise ValueError(
                    f"data.max_prompt_tokens + {name}.max_tokens = {longest} exceeds "
                    f"model.max_positions = {self.model.max_positions}: raise it or shorten them"
                )
            if longest > self.train.tokens_per_microbatch:
                raise ValueError(
                    f"data.max_prompt_tokens + {name}.max_tokens = {longest} exceeds "
                    f"train.tokens_per_microbatch = {self.train.tokens_per_microbatch}: raise it"
                )
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature = 0 leaves nothing to learn from: use 1.0")
        if self.grpo.entropy_coef and self.grpo.ratio != "token":
            raise ValueError('grpo.entropy_coef needs grpo.ratio = "token"')
        if self.rollout.prompts_per_step % self.grpo.updates_per_batch:
            raise ValueError(
                f"grpo.updates_per_batch = {self.grpo.updates_per_batch} does not divide "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}"
            )
        return self


class SFTTrain(Train):
    """The loop of supervised fine-tuning."""

    batch_size: Positive = 64  # sequences of one optimizer step


class SFTConfig(_Section):
    """`r1kern sft`: supervised fine-tuning on prompt and completion pairs."""

    run: Run = Run(folder="runs/sft")
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    experts: Experts = Experts()
    optim: Optim = Optim(lr=1e-5)
    train: SFTTrain = SFTTrain()


def load_config(kind: type[C], path: str | Path, overrides: list[str] = ()) -> C:
    """Read a YAML file, apply `section.key=value` overrides, validate.

    Args:
        kind: `TrainConfig` or `SFTConfig`.
        path: YAML file.
        overrides: dotted keys with YAML values, e.g. `optim.lr=1e-5`.

    Raises:
        UserError: no such file, not YAML, and one line with *all* violations: unknown keys with
            the nearest name, wrong types, values out of range.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise UserError(f"no config file {path}" + (f": did you mean {near[0]}?" if near else ""))
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as 'model:', not a {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse_config(kind, raw, str(path))


def parse_config(kind: type[C], raw: dict, source: str = "config") -> C:
    """Validate a nested dictionary; see `load_config`."""
    try:
        return kind(**raw)
    except ValidationError as error:
        lines = [_violation(kind, e) for e in error.errors()]
        raise UserError(f"{source}: " + "; ".join(lines)) from error


def dump_config(config: _Section) -> str:
    """The resolved options as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number (YAML 1.1 wants 1.0e-6)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _apply(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}' is not section.key=value")
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': '{section}' is not a section")
    node[last] = yaml.load(value, Loader=_Loader)


def _violation(kind: type[BaseModel], error: dict) -> str:
    """One pydantic error as `section.key: what is wrong`."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parent = kind
        for part in error["loc"][:-1]:
            parent = parent.model_fields[part].annotation
        known = list(parent.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        return f"unknown key '{where}' ({hint})"
    if error["type"] == "missing":
        return f"'{where}' is required"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
