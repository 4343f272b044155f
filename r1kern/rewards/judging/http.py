"""Requests to an OpenAI-compatible server: paced, bounded in number and time, tried again."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2

from r1kern.config import Judge
from r1kern.errors import UserError

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
REPEATED = frozenset({408, 409, 425, 429, *range(500, 600)})  # what another try may mend
SHOWN_CHARS = 200  # of a server's words in our messages

T = TypeVar("T")


class JudgeError(RuntimeError):
    """Why there is no judgement: one line.

    Attributes:
        status: of the HTTP answer, or None where there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Unreachable(JudgeError):
    """No HTTP answer came back."""


class Server:
    """One server as seen from one event loop."""

    def __init__(self, options: Judge):
        """Raises UserError for an address or a key that cannot be sent."""
        self.url = _checked_url(options.url)
        key = os.environ.get(options.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the key in {options.api_key_env} is not plain ASCII: correct it")
        self._options = options
        self._turns = asyncio.Semaphore(options.concurrency)
        self._pace = _Pace(options.requests_per_minute)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=options.timeout_s,
            limits=httpx2.Limits(max_connections=None),  # `_turns` bounds them
        )

    async def request(
        self,
        read: Callable[[dict], T],
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        retries: int | None = None,
    ) -> T:
        """What `read` finds in the JSON object that the server answers with.

        Statuses 408, 409, 425, 429 and 5xx, time-outs, lost connections and answers that are not
        OpenAI's JSON are tried again, after exponentially growing waits with jitter or, where the
        server gives one, after `Retry-After`; every other status is final. A request waits for its
        turn as long as those before it take; from then on it has `deadline_s`.

        Args:
            read: raises KeyError, IndexError, TypeError or AttributeError for a malformed answer,
                JudgeError for a final one.
            retries: in place of the options' own.

        Raises:
            JudgeError: with the last thing that went wrong.
        """
        retries = self._options.retries if retries is None else retries
        deadline_s = self._options.deadline_s
        last = "not asked yet"
        async with self._turns:
            await self._pace.turn()
            try:
                async with asyncio.timeout(deadline_s) as deadline:
                    for attempt in range(retries + 1):
                        if attempt:
                            await self._pace.turn()
                        try:
                            return await self._attempt(read, method, path, body)
                        except _TryAgain as error:
                            last = str(error)
                            if attempt == retries:
                                raise error.failure from error
                            wait = _backoff(attempt) if error.wait is None else error.wait
                        if asyncio.get_running_loop().time() + wait >= deadline.when():
                            raise JudgeError(f"{last} (another try after {wait:.0f} s is too late)")
                        await asyncio.sleep(wait)
            except TimeoutError:
                raise JudgeError(
                    f"no answer from {self.url} within deadline_s = {deadline_s:g} (last: {last})"
                ) from None
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self._client.aclose()

    async def _attempt(
        self, read: Callable[[dict], T], method: str, path: str, body: bytes | None
    ) -> T:
        timeout_s = self._options.timeout_s
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            # httpx2's own time-outs start again with every byte; this one does not.
            async with asyncio.timeout(timeout_s):
                answer = await self._client.request(
                    method, self.url + path, content=body, headers=headers
                )
        except (TimeoutError, httpx2.TimeoutException):
            message = f"{self.url} did not answer within timeout_s = {timeout_s:g}"
            raise _TryAgain(Unreachable(message)) from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            reason = shown(str(error)) or type(error).__name__
            raise _TryAgain(Unreachable(f"{self.url} cannot be reached: {reason}")) from error
        self._check_status(answer)
        return _read(self.url, answer, read)

    def _check_status(self, answer: httpx2.Response) -> None:
        if answer.is_success:
            return
        failure = _failure(self.url, answer)
        if answer.status_code not in REPEATED:
            raise failure
        wait = _retry_after(answer.headers.get("Retry-After"))
        if wait is not None and wait < self._options.deadline_s:
            self._pace.hold(wait)
        raise _TryAgain(failure, wait)


class _TryAgain(Exception):
    """A failure that another try may mend; `wait` in seconds where the server named one."""

    def __init__(self, failure: JudgeError, wait: float | None = None):
        super().__init__(str(failure))
        self.failure = failure
        self.wait = wait


class _Pace:
    """Even spacing of requests, and the pause that a server asks of everyone."""

    def __init__(self, per_minute: int):
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    def hold(self, seconds: float) -> None:
        self._next = max(self._next, time.monotonic() + seconds)

    async def turn(self) -> None:
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._interval
        await asyncio.sleep(start - now)


def _checked_url(text: str) -> str:
    try:
        url = httpx2.URL(text)
        valid = url.scheme in ("http", "https") and url.host and (url.port or 0) < 2**16
    except httpx2.InvalidURL:
        valid = False
    if not valid:
        raise UserError(
            f"judge.url '{text}' is no address of an API: give one such as http://localhost:8000/v1"
        )
    return text.rstrip("/")


def _backoff(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**attempt)


def _retry_after(value: str | None) -> float | None:
    """Seconds that `Retry-After` asks for, given in seconds or as a date; None without a sense."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _read(url: str, answer: httpx2.Response, read: Callable[[dict], T]) -> T:
    try:
        return read(json.loads(answer.content))
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        text = shown(answer.text)
        failure = JudgeError(f"{url} did not answer as OpenAI's API does: {text}")
        raise _TryAgain(failure) from None


def _failure(url: str, answer: httpx2.Response) -> JudgeError:
    try:
        text = str(json.loads(answer.content)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = answer.text
    return JudgeError(
        f"{url} answered HTTP {answer.status_code}: {shown(text)}", answer.status_code
    )


def shown(text: str) -> str:
    """The beginning of a text as one line."""
    line = " ".join(text[: 4 * SHOWN_CHARS].split())
    return line if len(line) <= SHOWN_CHARS else line[:SHOWN_CHARS] + "..."
