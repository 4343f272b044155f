"""The sections that commands share, each typed and frozen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


RecomputedPart = Literal[
    "full", "core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Run(Section):
    """Where the run lives and how long it may wait."""

    folder: str = "runs/grpo"
    seed: NonNegative = 0
    deadline_s: float = Field(600.0, gt=0)  # for any collective, sync or generation


class Model(Section):
    """The model in Hugging Face format."""

    path: str  # folder
    init: Literal["load", "random"] = "load"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_positions: Positive = 4096  # longest prompt plus completion
    trust_remote_code: bool = False  # run Python code that comes with tokenizer or model
    attention: Literal["auto", "sdpa", "varlen", "flash"] = "auto"  # auto: the best there is
    transformer_engine: bool = False  # its attention, norms and linears (CUDA)
    mtp_coef: float = Field(0.0, ge=0)  # weight of the multi-token-prediction loss; 0: kept as is
    precision: Literal["dtype", "fp8_blockwise"] = "dtype"  # of the routed experts' products
    fp8_linears: bool = False  # FP8 in the linears of attention, MLP and shared experts too
    fp8_scales: Literal["float32", "power_of_two"] = "float32"  # of FP8 tiles and blocks

    @model_validator(mode="after")
    def _fp8_fits(self):
        if self.precision == "dtype" and (self.fp8_linears or self.fp8_scales != "float32"):
            raise ValueError("fp8_linears and fp8_scales are options of precision = fp8_blockwise")
        if self.fp8_linears and self.transformer_engine:
            raise ValueError(
                "fp8_linears replaces the linears that transformer_engine replaces: set one of "
                "them to false"
            )
        return self

    @model_validator(mode="after")
    def _transformer_engine_fits(self):
        if self.transformer_engine and self.dtype != "bfloat16":
            raise ValueError("transformer_engine attends to packed sequences in bfloat16 only")
        if self.transformer_engine and self.attention != "auto":
            raise ValueError(
                "transformer_engine chooses its attention kernel itself: leave attention at auto"
            )
        return self


class Experts(Section):
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


class Parallel(Section):
    """Sizes of the parallel groups; data parallelism takes the rest of the world."""

    tp: Positive = 1  # tensor parallel, with sequence parallelism when > 1
    ep: Positive = 1  # expert parallel
    pp: Positive = 1  # pipeline parallel
    layers: list[Positive] = []  # of each pipeline stage; empty: even, first and last lighter
    generator_tp: Positive = 1  # tensor parallel of the vLLM replicas
    world_size: Positive | None = None  # processes the layout is made for; others are refused


class Data(Section):
    """Problems: `problem` and `answer` (GRPO) or `problem` and `completion` (SFT) per record."""

    train: str  # JSONL file, datasets folder, bundled:NAME or hub:owner/name[:split]
    eval: str | None = None
    template: Literal["r1-zero", "chat", "none"] = "r1-zero"
    max_prompt_tokens: Positive = 1024
    overlong: Literal["error", "drop"] = "error"
    where: dict[str, list[str]] = {}  # keep the records whose field has one of these values


class Sampling(Section):
    """How completions are drawn."""

    max_tokens: Positive = 1024
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class Rollout(Sampling):
    """Sampling during training."""

    prompts_per_step: Positive = 32
    group_size: Annotated[int, Field(ge=2)] = 16  # G, completions of a prompt


class Generator(Section):
    """The vLLM engine of each replica."""

    max_seqs: Positive = 256  # completions decoded at the same time
    kv_cache_gib: float = Field(1.0, gt=0)  # per rank
    enforce_eager: bool = True  # false: CUDA graphs for decoding (the trainer has none: ragged)
    sleep: bool = True  # weights and cache leave the GPU while the trainer works (CUDA)
    fp8: bool = False  # weights in 128 x 128 blocks of e4m3 (on CPU their values, emulated)
    sync_bucket_mib: Positive = 1024  # gathered weights in flight during a sync


class GRPO(Section):
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


class Optim(Section):
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


class Train(Section):
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


class Sandbox(Section):
    """Where programs under test run: bubblewrap, no network, read-only system, own /tmp."""

    timeout_s: float = Field(6.0, gt=0)  # clock time of one test
    memory_mb: Positive = 512  # address space of the program
    workers: NonNegative = 0  # programs tested at the same time; 0: one a core
    site_packages: bool = False  # programs and tests may import our installed packages
    unsafe_local: bool = False  # without bubblewrap: the program runs with this user's rights


class Judge(Section):
    """A language model behind an OpenAI-compatible server, vLLM's own included."""

    url: str  # of the API, such as http://localhost:8000/v1
    model: str
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key, if one is needed
    timeout_s: float = Field(120.0, gt=0)  # of one request, to its last byte
    deadline_s: float = Field(600.0, gt=0)  # of one answer: every try and the waits between
    retries: NonNegative = 4
    concurrency: Positive = 16  # requests in flight of one process
    requests_per_minute: NonNegative = 0  # 0: no limit
    max_tokens: Positive = 1024
    temperature: float = Field(0.0, ge=0)
    extra: dict[str, Any] = {}  # further fields of a request; null takes one of ours out
    cache: str | None = None  # file on a local disk that keeps every answer


class RewardModel(Section):
    """A model with a scalar head, trained by `r1kern reward`, that scores completions."""

    path: str  # folder
    reads: Literal["summary", "response"] = "response"  # paper: helpfulness reads the summary only


class Grading(Section):
    """How the reward terms judge."""

    deadline_s: float = Field(2.0, gt=0)  # processor time of one mathematical verdict
    sandbox: Sandbox = Sandbox()
    judge: Judge | None = None  # for answers that no rule can judge
    preference_tasks: list[str] = ["general"]  # of the prompts that reward models score
    language: str | None = None  # target of the language term; None: each record's own, else "en"
    overlong_buffer: NonNegative = 0  # last tokens of the budget over which the penalty grows
    repetition_ngram: Positive = 20  # words of the n-grams that the repetition penalty counts
