"""Distributed, resumable sampling and grading.

The prompts are cut into chunks. Every engine of the torchrun world takes the next chunk that is
left, samples it, and while it samples another one has it graded and written. A chunk's file gets
its name when it is whole, so a job killed anywhere loses only chunks in work, and the same call
again samples what is missing. Samples of other weights or other options lie in other folders and
never mix. On several machines `folder` must be on a file system that all of them see.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import count
from pathlib import Path

import torch.distributed as dist

from r1kern import config, watch
from r1kern.agreement import agree, shared_store
from r1kern.data.tokenizer import load_tokenizer
from r1kern.distributed import World
from r1kern.errors import UserError
from r1kern.eval.identity import digest, model_identity
from r1kern.generate.engine import Generator, Sampling
from r1kern.report.rollouts import read_rollouts, write_rollouts
from r1kern.types import Prompt, Rollout

log = logging.getLogger(__name__)
Score = Callable[[list[Rollout]], list[Rollout]]


class Sampler:
    """A model folder to sample from; its engine is built when a sample is missing.

    All ranks make it and call its methods together with equal arguments.

    Args:
        model: folder in Hugging Face format, weights included.
        max_model_len: longest prompt and completion together, in tokens.
        generator_tp: ranks of one engine; the world holds `world.size / generator_tp` engines.
        dtype: "auto" is float32 on CPU, bfloat16 elsewhere.
        deadline_s: for a chunk to be sampled, and to be graded.

    Attributes:
        tokenizer: of the model.
        stop_ids: tokens that end a completion, those of `generation_config.json` included.

    Raises:
        UserError: no such model, or a world that does not consist of whole engines.
    """

    def __init__(
        self,
        model: str | Path,
        world: World,
        *,
        max_model_len: int,
        generator: config.Generator | None = None,
        generator_tp: int = 1,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        deadline_s: float = 600.0,
    ):
        if world.size % generator_tp:
            raise UserError(
                f"{world.size} processes do not make engines of parallel.generator_tp="
                f"{generator_tp} ranks: start a multiple of {generator_tp} with torchrun"
            )
        self.model, self.world, self.deadline_s = Path(model), world, deadline_s
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.stop_ids = _stop_ids(self.model, self.tokenizer)
        options = generator or config.Generator()
        automatic = "float32" if world.device.type == "cpu" else "bfloat16"
        self._arguments = dict(
            dtype=automatic if dtype == "auto" else dtype,
            max_model_len=max_model_len,
            max_num_seqs=options.max_seqs,
            kv_cache_gib=options.kv_cache_gib,
            enforce_eager=options.enforce_eager,
            quantized=options.fp8,
            device=world.device.type,
            tensor_parallel=generator_tp,
            tokenizer=self.tokenizer,
            trust_remote_code=trust_remote_code,
        )
        self._engine, self._is_leader = world.rank // generator_tp, world.rank % generator_tp == 0
        self._num_engines = world.size // generator_tp
        self._generator: Generator | None = None

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        folder: str | Path,
        score: Score,
        seed: int = 0,
        chunk: int = 0,
        regrade: bool = False,
    ) -> Samples:
        """Graded completions of every prompt, sampled where `folder` does not hold them yet.

        A chunk's samples are a function of weights, options, `seed` and the chunk alone: with
        `chunk` given they are the same, bit for bit, on any number of engines.

        Args:
            sampling: `stop_ids` may be left empty: then the model's.
            folder: chunks are kept in `FOLDER/samples/FINGERPRINT/`.
            score: gives each rollout its scores; called with a chunk, in a thread.
            seed: other seeds are other samples, in a folder of their own.
            chunk: prompts of a chunk; 0: as many as fill an engine, fewer where engines would
                be without work.
            regrade: score stored samples again.

        Raises:
            UserError: two prompts are the same, or a stored file cannot be read.
        """
        if not sampling.stop_ids:
            sampling = dataclasses.replace(sampling, stop_ids=self.stop_ids)
        store = _Store.of(self._folder(Path(folder), sampling, seed), prompts)
        size = chunk or min(
            max(1, self._arguments["max_num_seqs"] // sampling.n),
            max(1, -(-len(prompts) // self._num_engines)),
        )
        todo = self._agree_on_missing(store, size, sampling, seed)
        if regrade:
            self._regrade(store, score)
        if todo:
            self._work(todo, store, sampling, seed, score)
        return Samples(tuple(prompts), store.places, score)

    def close(self) -> None:
        """Frees the engine, if there is one."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    def _folder(self, folder: Path, sampling: Sampling, seed: int) -> Path:
        """Where samples of these weights and options lie; says in `options.json` which they are."""
        options = {
            "model": model_identity(self.model),
            "sampling": dataclasses.asdict(sampling),
            "seed": seed,
            "dtype": self._arguments["dtype"],
            "fp8": self._arguments["quantized"],
        }
        folder = folder / "samples" / digest(options)
        if self.world.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder} cannot be made ({error}): choose another") from error
            named = options | {"path": str(self.model)}
            (folder / "options.json").write_text(json.dumps(named, indent=1))
        return folder

    def _agree_on_missing(self, store: _Store, size: int, *options) -> list[list[Prompt]]:
        """The chunks to sample; `store.places` names the files of all prompts then."""
        agree("the prompts", {"digest": store.digest}, deadline_s=self.deadline_s)
        found: list = [None]
        if self.world.is_main:
            found = [(store.look(size), uuid.uuid4().hex)]
        if self.world.size > 1:
            dist.broadcast_object_list(found, src=0, device=self.world.device)
        (store.places, missing), self._call = found[0]
        by_key = dict(zip(store.keys, store.prompts, strict=True))
        todo = []
        for keys in missing:
            todo.append([by_key[key] for key in keys])
            store.places |= dict.fromkeys(keys, store.file(keys))
        return todo

    def _work(
        self,
        todo: list[list[Prompt]],
        store: _Store,
        sampling: Sampling,
        seed: int,
        score: Score,
    ) -> None:
        if self._generator is None:
            with watch.deadline("building the generator", self.deadline_s):
                self._generator = Generator(self.model, **self._arguments)
        turns = dist.PrefixStore(f"sampling/{self._call}", shared_store())
        progress = _Progress(todo, sampling.n, turns)

        def keep(chunk: list[Prompt], rollouts: list[Rollout]) -> None:
            write_rollouts(store.places[_key(chunk[0])], score(rollouts))
            turns.add("done", 1)

        with ThreadPoolExecutor(1, "grading") as grading:
            graded: Future | None = None
            for number in self._turns(turns, len(todo)):
                chunk = todo[number]
                with watch.deadline(f"sampling chunk {number}", self.deadline_s):
                    watch.at(f"{len(chunk)} prompts from {chunk[0].id}")
                    rollouts = self._generator.generate(chunk, sampling, _chunk_seed(seed, chunk))
                self._await_grading(graded)
                if self._is_leader:
                    graded = grading.submit(keep, chunk, rollouts)
                if self.world.is_main:
                    progress.tell()
            self._await_grading(graded)
        # An engine is late by the chunk in its hands, which has two deadlines of its own.
        with watch.deadline("waiting for the other engines' samples", 2 * self.deadline_s):
            while turns.add("done", 0) < len(todo):
                time.sleep(0.2)
        if self.world.is_main:
            progress.tell()

    def _turns(self, turns: dist.Store, total: int) -> Iterator[int]:
        """Numbers of chunks, each given to one engine; its ranks get the same ones."""
        for turn in count():
            key = f"{self._engine}/{turn}"
            if self._is_leader:
                turns.set(key, str(turns.add("next", 1) - 1))
            turns.wait([key], timedelta(seconds=self.deadline_s))
            number = int(turns.get(key))
            if number >= total:
                return
            yield number

    def _await_grading(self, graded: Future | None) -> None:
        if graded is not None:
            with watch.deadline("grading", self.deadline_s):
                graded.result()

    def _regrade(self, store: _Store, score: Score) -> None:
        """Score the stored samples again, each file on one rank."""
        files = sorted(path for path in set(store.places.values()) if path.is_file())
        for path in files[self.world.rank :: self.world.size]:
            with watch.deadline("grading", self.deadline_s):
                write_rollouts(path, score(store.with_present_prompts(_read(path))))
        dist.barrier()


@dataclass(frozen=True)
class Samples:
    """Graded rollouts on disk, in the order of `prompts`; iterate to read them, file by file.

    Attributes:
        prompts: one rollout each.
        places: file of each prompt's rollout, by `_key`.
        score: judges anew what was stored with another answer or other tests.
    """

    prompts: tuple[Prompt, ...]
    places: dict[str, Path]
    score: Score

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Rollout]:
        read = lru_cache(maxsize=2)(_read_by_key)
        for prompt in self.prompts:
            key = _key(prompt)
            rollout = read(self.places[key])[key]
            if rollout.prompt != prompt:
                (rollout,) = self.score([dataclasses.replace(rollout, prompt=prompt)])
            yield rollout


@dataclass
class _Store:
    """Stored chunks of one call."""

    folder: Path
    prompts: list[Prompt]
    keys: list[str]
    places: dict[str, Path]  # file of each prompt

    @classmethod
    def of(cls, folder: Path, prompts: Sequence[Prompt]) -> _Store:
        seen: dict[str, Prompt] = {}
        for prompt in prompts:
            if seen.setdefault(_key(prompt), prompt) is not prompt:
                raise UserError(f"prompt '{prompt.id}' occurs twice: make ids unique")
        return cls(folder, list(prompts), list(seen), {})

    @property
    def digest(self) -> str:
        return digest([str(self.folder), *self.keys])

    def file(self, keys: Sequence[str]) -> Path:
        return self.folder / f"{digest(list(keys))}.jsonl"

    def look(self, size: int) -> tuple[dict[str, Path], list[list[str]]]:
        """Files by prompt, and the chunks of at most `size` prompts that are missing.

        The plan is that of the whole call, so that a resumed job samples the chunks that an
        uninterrupted one would have. Files of other plans are used for what they hold.
        """
        plan = [self.keys[i : i + size] for i in range(0, len(self.keys), size)]
        whole = {path for keys in plan if (path := self.file(keys)).is_file()}
        places: dict[str, Path] = {}
        for path in sorted(set(self.folder.glob("*.jsonl")) - whole):
            places |= dict.fromkeys(_read_by_key(path).keys() & set(self.keys), path)
        for keys in plan:
            if (path := self.file(keys)) in whole:
                places |= dict.fromkeys(keys, path)
        missing = [[key for key in keys if key not in places] for keys in plan]
        return places, [keys for keys in missing if keys]

    def with_present_prompts(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts with the answers and tests that the call's prompts have."""
        present = dict(zip(self.keys, self.prompts, strict=True))
        return [
            dataclasses.replace(r, prompt=present.get(_key(r.prompt), r.prompt)) for r in rollouts
        ]


class _Progress:
    """Lines that tell how far all engines are."""

    def __init__(self, todo: list[list[Prompt]], samples: int, turns: dist.Store):
        self._total, self._turns = len(todo), turns
        self._completions = samples * sum(map(len, todo))
        self._started = time.monotonic()
        log.info("sampling %d completions in %d chunks", self._completions, self._total)

    def tell(self) -> None:
        done = self._turns.add("done", 0)
        if done:
            spent = time.monotonic() - self._started
            left = timedelta(seconds=round(spent / done * (self._total - done)))
            log.info("graded: %d of %d chunks in %.1f s, %s to go", done, self._total, spent, left)


def _stop_ids(model: Path, tokenizer) -> tuple[int, ...]:
    path = model / "generation_config.json"
    named = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(sorted({tokenizer.eos_token_id, *ids}))


def _key(prompt: Prompt) -> str:
    """What a prompt's samples depend on, with its name."""
    return digest([prompt.id, *prompt.ids])


def _chunk_seed(seed: int, chunk: list[Prompt]) -> int:
    text = json.dumps([seed, *map(_key, chunk)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _read(path: Path) -> list[Rollout]:
    try:
        return read_rollouts(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): remove it and its samples "
            "are drawn again"
        ) from error


def _read_by_key(path: Path) -> dict[str, Rollout]:
    return {_key(rollout.prompt): rollout for rollout in _read(path)}
