"""vLLM inside the trainer's processes: groups of completions with their log-probabilities.

One engine spans `tensor_parallel` consecutive ranks of the torchrun world; the ranks outside it
hold engines of their own. All ranks of one engine call every method together with equal arguments.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from r1kern.errors import UserError
from r1kern.generate import fp8, host, sleep, sync, vllm_cpu
from r1kern.hf.fp8_blocks import QUANTIZATION
from r1kern.types import Completion, Prompt, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        n: completions per prompt (G).
        max_tokens: token budget of one completion.
        temperature: 0 is greedy.
        top_p: nucleus mass; 1 keeps the whole vocabulary, as training needs.
        stop_ids: token ids that end a completion; the sampled one is kept in its ids.
        logps: return log-probabilities, of the distribution really sampled from (after
            temperature and top-p); without them `Completion.logps` is empty.
    """

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    logps: bool = True


class Generator:
    """A vLLM engine that shares its processes with the trainer.

    Args:
        model: folder in Hugging Face format (or a hub name).
        dtype: "float32", "bfloat16", ...
        max_model_len: longest prompt and completion together, in tokens.
        max_num_seqs: completions decoded at the same time.
        device: "cpu" or "cuda".
        kv_cache_gib: size of the key-value cache.
        tensor_parallel: ranks of one engine.
        tokenizer: a transformers tokenizer; without one the completions' texts stay empty.
        load_weights: read the folder's weights; otherwise the first `sync` brings them.
        enforce_eager: no CUDA graphs (of the decoding steps) and no compilation; must hold on CPU.
        prefix_caching: compute the prompt of a group once (not with MLA on CPU).
        trust_remote_code: run Python code that comes with the model.
        can_sleep: build the engine so that `sleep` frees its memory (CUDA; elsewhere `sleep` does
            nothing).
        quantized: hold and compute with FP8 weights in blocks of 128 x 128, made from the tensors
            of each `sync`; on CPU hold their values in `dtype`.
        power_of_two: of the scales of those blocks.
    Attributes:
        version: updates that the weights have received; None when there are none (before the
            first sync without `load_weights`, after `sleep`, `close` or a sync that failed).
    Raises:
        UserError: torch.distributed is not initialised, an option cannot work on this device or
            with this allocator, or (CPU) another vLLM is installed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        device: str,
        kv_cache_gib: float,
        tensor_parallel: int = 1,
        tokenizer=None,
        load_weights: bool = True,
        enforce_eager: bool = True,
        prefix_caching: bool = False,
        trust_remote_code: bool = False,
        can_sleep: bool = False,
        quantized: bool = False,
        power_of_two: bool = False,
    ):
        if quantized and device == "cpu" and load_weights:
            raise UserError(
                "generator.fp8 needs CUDA where no trainer sends the weights, this process runs on "
                "cpu: set generator.fp8=false"
            )
        if device == "cpu" and not enforce_eager:
            raise UserError(
                "generator.enforce_eager=false captures CUDA graphs, and there is no GPU: leave it "
                "at true"
            )
        if not torch.distributed.is_initialized():
            # vLLM would make the default group its own, and the trainer's collectives silently
            # would reduce over one rank
            raise UserError(
                "torch.distributed is not initialised: call r1kern.distributed.start() first"
            )
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._device = device
        self._can_sleep = can_sleep and device == "cuda"
        self._asleep: set[str] = set()
        self._quantized, self._power_of_two = quantized, power_of_two
        self.version = 0 if load_weights else None
        arguments = dict(
            model=str(model),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher",
            load_format="auto" if load_weights else "dummy",
            enforce_eager=enforce_eager,
            enable_prefix_caching=prefix_caching,
            trust_remote_code=trust_remote_code,
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        if quantized and device == "cuda":
            arguments["hf_overrides"] = {"quantization_config": QUANTIZATION}
        elif not load_weights:  # the folder's own weights may be FP8, those to come are not
            arguments["hf_overrides"] = {"quantization_config": None}
        if self._can_sleep:
            sleep.check_allocator(os.environ)
            arguments["enable_sleep_mode"] = True
        elif can_sleep:
            log.info("the generator does not sleep on %s: its memory stays with it", device)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        if max_model_len > config.max_position_embeddings:
            raise UserError(
                f"max_model_len {max_model_len} exceeds the model's max_position_embeddings "
                f"{config.max_position_embeddings}: lower it"
            )
        variables = environment(config, Path(model).is_dir(), device)
        with (
            host.environment(variables),
            host.quiet(),
            host.random_state(device),
            host.thread_control(),
        ):
            self._vllm, self._llm = build(arguments, device)
        self._finalizer = weakref.finalize(self, shut_down, self._llm)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        done: Callable[[int, Rollout], None] = lambda place, rollout: None,
    ) -> list[Rollout]:
        """Draws `sampling.n` completions for each prompt.

        The same prompts, sampling, weights and seed give the same completions, bit for bit. One
        seed covers the call: a generator per sequence would cost a Python loop in every step.

        Args:
            done: called with each group and its place as soon as it is whole, while others are
                still decoded; it must not wait.
        Returns:
            One rollout a prompt, in order.
        Raises:
            UserError: a prompt and its completion may not fit into `max_model_len`.
        """
        assert self.version is not None, "the engine holds no weights (closed, or never synced)"
        assert not self._asleep, "the engine sleeps"
        for prompt in prompts:
            if len(prompt.ids) + sampling.max_tokens > self._max_model_len:
                raise UserError(
                    f"prompt {prompt.id}: {len(prompt.ids)} tokens and {sampling.max_tokens} to "
                    f"generate exceed max_model_len {self._max_model_len}: shorten the prompt, "
                    "lower max_tokens or raise max_model_len"
                )
        params = self._vllm.SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,
            logprobs=0 if sampling.logps else None,
            flat_logprobs=True,
            detokenize=False,
        )
        inputs = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        # old weights' keys and values must go, and this call must not depend on earlier ones
        self._llm.reset_prefix_cache()
        with host.random_state(self._device):
            torch.manual_seed(seed)
            names = self._llm.enqueue(inputs, params, use_tqdm=False)
            # to the name that outputs carry some versions append a random part here
            places = {name.partition("-")[0]: i for i, name in enumerate(names)}
            groups: dict[int, Rollout] = {}
            for output in self._finished():
                i = places[output.request_id]
                groups[i] = Rollout(prompts[i], self._completions(output.outputs), self.version)
                done(i, groups[i])
        return [groups[i] for i in range(len(prompts))]

    def _finished(self):
        """Decodes; yields the engine's outputs as they become whole."""
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            yield from (output for output in engine.step() if output.finished)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[tuple[float, bool]]]:
        """Log-probabilities of given token ids, at temperature 1.

        Args:
            sequences: token ids, each shorter than `max_model_len`.

        Returns:
            For each sequence and each of its tokens but the first: the log-probability after the
            tokens before it, and whether no other token was likelier.
        Raises:
            UserError: a sequence is too long.
        """
        assert self.version is not None, "the engine holds no weights (closed, or never synced)"
        assert not self._asleep, "the engine sleeps"
        for ids in sequences:
            if len(ids) >= self._max_model_len:
                raise UserError(
                    f"{len(ids)} tokens to score do not fit max_model_len {self._max_model_len} "
                    "with the one generated behind them: raise max_model_len"
                )
        # vLLM generates at least one token
        params = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        self._llm.reset_prefix_cache()
        inputs = [{"prompt_token_ids": list(ids)} for ids in sequences]
        with host.random_state(self._device):
            outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [
            [
                (entry[token].logprob, entry[token].rank == 1)
                for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            ]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def _completions(self, outputs) -> tuple[Completion, ...]:
        ids = [tuple(output.token_ids) for output in outputs]
        texts = [""] * len(ids)
        if self._tokenizer is not None:
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return tuple(
            Completion(i, tuple(o.logprobs.logprobs) if o.logprobs else (), text, o.finish_reason)
            for i, text, o in zip(ids, texts, outputs, strict=True)
        )

    def sync(
        self,
        buckets: Iterable[Iterable[tuple[str, torch.Tensor]]],
        expected: Mapping[str, tuple[int, ...]],
        version: int,
    ) -> sync.SyncReport:
        """Replaces all weights, bucket by bucket; see `r1kern.generate.sync.receive`.

        Args:
            buckets: lists of whole tensors by published names, in bf16 or float32 also for a
                quantised engine.
            expected: name and shape of every tensor that the buckets hold.
            version: number of optimizer updates the weights have received.
        Raises:
            SyncError: weights did not arrive whole, and the engine is closed.
        """
        assert self._llm is not None, "the engine is closed"
        assert "weights" not in self._asleep, "the engine sleeps"
        if self._quantized:
            on_gpu = self._device == "cuda"
            encode = partial(
                fp8.publish if on_gpu else fp8.emulate, power_of_two=self._power_of_two
            )
            buckets = map(encode, buckets)
            expected = fp8.published_shapes(expected) if on_gpu else expected
        try:
            (report,) = self._llm.collective_rpc(sync.receive, args=(buckets, expected, version))
        except BaseException:
            # vLLM cannot take up or repeat a load that broke off: it would count elements twice
            self.close()
            raise
        self.version = version
        return report

    def sleep(self) -> sleep.SleepReport | None:
        """Gives weights and cache back to the GPU; to be followed by `wake` and `sync`.

        Returns:
            What came free; None where the engine cannot sleep (CPU) or already does.
        Raises:
            RuntimeError: less memory came free than weights and cache held.
        """
        if not self._can_sleep or self._asleep:
            return None
        report = sleep.sleep(self._llm)
        self.version, self._asleep = None, set(sleep.TAGS)
        return report

    def wake(self, tag: str) -> None:
        """Takes memory again: "weights", to be filled by `sync`, then "kv_cache".

        Nothing happens where that is awake.
        """
        if tag in self._asleep:
            sleep.wake(self._llm, tag)
            self._asleep.remove(tag)

    def close(self) -> None:
        """Frees the model and the cache; also done at exit. Another engine may follow."""
        self._llm = self.version = None
        self._finalizer()
        collect_and_freeze()  # as it was while vLLM ran


def build(arguments: dict, device: str):
    """Imports vLLM, as late as this because it reads the environment, and builds the engine."""
    import vllm

    vllm.envs.disable_envs_cache()
    collect_and_freeze()
    if device == "cpu":
        vllm_cpu.check_version(vllm.__version__)
        shared_memory = vllm_cpu.name_shared_memory()
        arguments = arguments | vllm_cpu.engine_arguments()
    llm = vllm.LLM(**arguments)
    # vLLM 0.32's own finalizer would destroy the trainer's process groups with the engine
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
    if device == "cpu":
        vllm_cpu.unlink_shared_memory(shared_memory)
        llm.apply_model(vllm_cpu.check_rope)
    return vllm, llm


def collect_and_freeze() -> None:
    """Collections to come skip what is there now: vLLM asks for some while it starts, checkpoints
    for more, and each would walk all that was imported (half a second)."""
    gc.collect()
    gc.freeze()


def shut_down(llm) -> None:
    llm.llm_engine.engine_core.engine_core.model_executor.shutdown()
    gc.unfreeze()


def environment(config, is_folder: bool, device: str) -> dict[str, str]:
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "RANK": str(torch.distributed.get_rank()),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
        "VLLM_MLA_DISABLE": "0",
    }
    if is_folder:
        variables["HF_HUB_OFFLINE"] = "1"
    if device == "cpu" and hasattr(config, "kv_lora_rank") and not vllm_cpu.has_mla_kernel(config):
        log.info("vLLM's CPU latent-attention kernel does not fit this model: plain heads instead")
        variables["VLLM_MLA_DISABLE"] = "1"
    return variables
