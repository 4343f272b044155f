"""A language model as judge, behind any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, TypeVar

from r1kern.config import Judge
from r1kern.errors import UserError
from r1kern.rewards.format import parts
from r1kern.rewards.judging.cache import AnswerCache
from r1kern.rewards.judging.http import JudgeError, Server, Unreachable, shown
from r1kern.rewards.judging.prompts import (
    LABELS,
    Messages,
    pair_messages,
    read_label,
    read_verdict,
    reference_messages,
    reminder,
)
from r1kern.rewards.verdict import Verdict

T = TypeVar("T")
LISTED_MODELS = 8


@dataclass(frozen=True)
class Preference:
    """Which of two answers a judge prefers, asked in both orders.

    Attributes:
        winner: "a" or "b" where both orders agree, else "tie"; None when the judge failed.
        labels: what the judge said with `a` in first place (A), then with `b` in first place; each
            one of `judging.prompts.LABELS`, as said.
        explanations: the judge's words for each.
        failure: why there is no preference, or None.
    """

    winner: Literal["a", "b", "tie"] | None
    labels: tuple[str, ...] = ()
    explanations: tuple[str, ...] = ()
    failure: str | None = None


class JudgeClient:
    """Asks a judge from any thread; requests run in a thread of their own, many at a time.

    `concurrency` and `requests_per_minute` hold for this object: give each of R processes its
    share. A client does not survive a fork; make one in each process.
    """

    def __init__(self, options: Judge):
        """Raises UserError for a cache, a url or a key that cannot be used; asks nothing yet."""
        self._options = options
        self._cache = AnswerCache(options.cache) if options.cache else None
        self._server = Server(options)
        self._owner = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the requests in flight (their futures are cancelled) and the thread."""
        if self._loop.is_closed():
            return
        self._start(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._cache:
            self._cache.close()

    def check(self) -> None:
        """Asks the server for its models and the judge for a word.

        Raises:
            UserError: the server cannot be reached, wants a key, does not serve the model or does
                not take our requests; one line with the remedy.
        """
        url, model = self._options.url, self._options.model
        try:
            served = self._start(
                self._server.request(_model_names, "GET", "/models", retries=1)
            ).result()
        except JudgeError as error:
            raise self._mistake(error) from error
        if model not in served:
            listed = ", ".join(served[:LISTED_MODELS]) or "no model"
            more = f" and {len(served) - LISTED_MODELS} more" if len(served) > LISTED_MODELS else ""
            raise UserError(
                f"the judge's server {url} does not serve '{model}' but {listed}{more}: "
                "correct judge.model"
            )
        try:
            hello = [{"role": "user", "content": "Answer with the word ready."}]
            self._start(
                self._server.request(
                    lambda reply: reply["choices"][0]["message"],
                    "POST",
                    "/chat/completions",
                    self._request(hello),
                )
            ).result()
        except JudgeError as error:
            raise self._mistake(error) from error

    def ask(self, messages: Messages) -> str:
        """The judge's whole answer to a conversation; JudgeError when there is none."""
        return self._start(self._ask(messages)).result()

    def ask_all(self, conversations: Sequence[Messages]) -> list[str | JudgeError]:
        """One answer or failure a conversation, in order."""
        futures = [self._start(_caught(self._ask(messages))) for messages in conversations]
        return [future.result() for future in futures]

    def submit(self, question: str, gold: str, prediction: str) -> Future[Verdict]:
        """Whether a prediction gives the gold answer; never blocks, never raises on a failure.

        DeepSeek-R1 (arXiv 2501.12948), section 2.3.3: "feeding the ground-truth and model
        predictions into DeepSeek-V3 for judgment". The judge is shown the final summary only
        (`rewards.format.parts`). Without a summary the verdict is False, and nobody is asked.

        Returns:
            Of a `Verdict`; its `failure` says that the judge gave none. A judge whose answer cannot
            be read is reminded once.
        """
        return self._start(self._grade(question, gold, parts(prediction).summary))

    def grade_reference(self, items: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """`submit` for many (question, gold, prediction), in order."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    def submit_pair(self, question: str, a: str, b: str) -> Future[Preference]:
        """Which of two texts answers better; never blocks, never raises on a failure.

        Both orders are asked, and a judge that does not decide the same way twice sees a tie. The
        texts are shown as they are: pass summaries to keep length out of it.
        """
        return self._start(self._compare(question, a, b))

    def compare(self, question: str, a: str, b: str) -> Preference:
        """`submit_pair`, awaited."""
        return self.submit_pair(question, a, b).result()

    def _start(self, work: Coroutine[None, None, T]) -> Future[T]:
        if self._owner != os.getpid():
            work.close()
            raise RuntimeError("a JudgeClient does not survive a fork: make one in this process")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._server.close()

    async def _grade(self, question: str, gold: str, summary: str) -> Verdict:
        if not gold.strip():
            return Verdict(False, "judge: the record has no gold answer")
        if not summary:
            return Verdict(False)
        messages = reference_messages(question, gold, summary)
        try:
            correct, _ = await self._judge(messages, "reference", read_verdict)
        except JudgeError as error:
            return Verdict(False, f"judge: {error}")
        return Verdict(correct)

    async def _compare(self, question: str, a: str, b: str) -> Preference:
        orders = [pair_messages(question, a, b), pair_messages(question, b, a)]
        asked = [_caught(self._judge(messages, "pair", read_label)) for messages in orders]
        said = await asyncio.gather(*asked)
        failures = [str(error) for error in said if isinstance(error, JudgeError)]
        if failures:
            return Preference(None, failure=f"judge: {failures[0]}")
        labels, explanations = zip(*said, strict=True)
        return Preference(_winner(*labels), labels, explanations)

    async def _judge(
        self, messages: Messages, task: str, read: Callable[[str], T | None]
    ) -> tuple[T, str]:
        """What `read` finds in the judge's answer, and the answer."""
        answer = await self._ask(messages, read)
        value = read(answer)
        if value is None:
            answer = await self._ask(reminder(messages, answer, task), read)
            value = read(answer)
        if value is None:
            raise JudgeError(f"{self._options.model} gave no verdict, twice: '{shown(answer)}'")
        return value, answer

    async def _ask(self, messages: Messages, read: Callable[[str], object] = str) -> str:
        """The whole answer, kept in the cache when `read` can read it."""
        request = self._request(messages)
        answer = self._cache.get(request) if self._cache else None
        if answer is None:
            answer = await self._server.request(self._content, "POST", "/chat/completions", request)
            if self._cache and read(answer) is not None:
                self._cache.put(request, answer)
        return answer

    def _request(self, messages: Messages) -> bytes:
        options = self._options
        fields = {
            "model": options.model,
            "messages": messages,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            **options.extra,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(given, sort_keys=True).encode("ascii")

    def _content(self, reply: dict) -> str:
        choice = reply["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
        if message.get("refusal"):
            raise JudgeError(f"{self._options.model} refuses: {shown(str(message['refusal']))}")
        if finish == "length":
            raise JudgeError(
                f"{self._options.model} ran out of tokens: raise judge.max_tokens = "
                f"{self._options.max_tokens}"
            )
        if finish != "stop":
            raise JudgeError(f"{self._options.model} did not finish: finish_reason '{finish}'")
        if not isinstance(message["content"], str):
            raise TypeError("content is no text")
        return message["content"].encode("utf-8", "replace").decode()  # no lone surrogates

    def _mistake(self, error: JudgeError) -> UserError:
        """What the user is to mend after a failed check."""
        variable, model = self._options.api_key_env, self._options.model
        if error.status in (401, 403) and not os.environ.get(variable, "").strip():
            return UserError(f"{error}: it wants a key: set the environment variable {variable}")
        if error.status in (401, 403):
            return UserError(f"{error}: the key in {variable} is not accepted: put a valid one")
        if error.status == 404:
            return UserError(
                f"{error}: judge.url must be that of the API, such as http://localhost:8000/v1"
            )
        if isinstance(error, Unreachable):
            return UserError(
                f"no judge: {error}: start one (`vllm serve {model}`) or correct judge.url"
            )
        return UserError(f"the judge cannot be used: {error}: correct the judge options")


async def _caught(work: Coroutine[None, None, T]) -> T | JudgeError:
    try:
        return await work
    except JudgeError as error:
        return error


def _model_names(reply: dict) -> list[str]:
    return [model["id"] for model in reply["data"]]


def _winner(first: str, swapped: str) -> Literal["a", "b", "tie"]:
    """From the label with a in first place and the one with b there."""
    better = LABELS[first], -LABELS[swapped]
    if min(better) > 0:
        return "a"
    return "b" if max(better) < 0 else "tie"
