"""The client of an OpenAI-compatible chat endpoint: a time limit for the whole of a request, and retries if they can help."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from megatron_r1.errors import ConfigError, RewardError

T = TypeVar("T")

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # the same request may succeed later
_OUR_FAULT = {401, 403, 405}  # no request will ever succeed
_NOT_FOUND = 404  # a wrong path or model; or a router that has lost its server for a moment
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_MAX_REPLY_BYTES = 16 << 20


@dataclass(frozen=True)
class Completion:
    """What a chat model said."""

    text: str
    finished: bool  #: the model ended its answer; False: the answer was cut at max_tokens
    reasoning: str = ""  #: some servers return it apart from the text
    tokens: int | None = None  #: of the whole output, reasoning included; None: the server does not count them


class NoCompletion(Exception):
    """All attempts failed. `outcome` is "timeout" if the last attempt was late, else "error"; the text is one line."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


class _Failed(Exception):
    """An attempt failed, and another one may succeed."""

    def __init__(self, outcome: str, reason: str, pause_seconds: float = 0.0, refusal: RewardError | None = None) -> None:
        super().__init__(reason)
        self.outcome, self.pause_seconds, self.refusal = outcome, pause_seconds, refusal


class ChatEndpoint:
    """Sends `POST <url>/chat/completions`. Safe to use from many threads. It takes no proxy from the environment.

    Args:
        url: base URL, e.g. http://localhost:8000/v1.
        timeout_seconds: for one attempt as a whole.
        retries: further attempts after the first.
        section: the settings that messages name, e.g. "reward.judge".
        pause: for tests: how to wait.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout_seconds: float,
        retries: int,
        section: str,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()  #: "requests", "retries", "http_<status>", "late", "invalid", "unreachable", tokens
        self._url, self._timeout_seconds, self._retries, self._section = url.rstrip("/"), timeout_seconds, retries, section
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        unlimited = httpx.Limits(max_connections=None)  # the caller limits how many requests are under way
        self._client = httpx.Client(headers=headers, timeout=timeout_seconds, limits=unlimited, trust_env=False)
        self._closing = threading.Event()
        self._pause = pause or self._closing.wait
        self._lock = threading.Lock()

    def complete(self, request: dict[str, Any], read: Callable[[str], T]) -> tuple[str, T]:
        """The model's whole output, and what `read` makes of it. An output that was cut at the limit is a failed attempt.

        Args:
            request: body of the request. Its seed rises with every attempt; otherwise a seeded server would repeat its answer.
            read: raises ValueError if the output is not what was asked for, which is a failed attempt.

        Raises:
            NoCompletion: every attempt failed.
            RewardError: the endpoint refuses the key, or, in every attempt, the path or the model.
        """

        def take(completion: Completion) -> tuple[str, T]:
            if not completion.finished:
                raise ValueError("finish_reason is 'length'")
            return completion.text, read(completion.text)

        return self._try(request, take)

    def sample(self, request: dict[str, Any]) -> Completion:
        """One response, whole or cut at the limit. Raises what `complete` raises."""
        return self._try(request, lambda completion: completion)

    def _try(self, request: dict[str, Any], take: Callable[[Completion], T]) -> T:
        for attempt in range(self._retries + 1):
            try:
                completion = self._request({**request, "seed": request["seed"] + attempt})
                try:
                    return take(completion)
                except ValueError as error:
                    self._count("invalid")
                    raise _Failed("error", f"the answer of the endpoint of {self._section} cannot be used: {error}") from None
            except _Failed as failed:
                if attempt == self._retries and failed.refusal is not None:
                    raise failed.refusal from None
                if attempt == self._retries or self._closing.is_set():
                    raise NoCompletion(failed.outcome, f"{failed} ({attempt + 1} attempts)") from None
                self._count("retries")
                self._pause(max(failed.pause_seconds, _back_off(attempt)))
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Start no further attempt, and close the connections."""
        self._closing.set()
        self._client.close()

    def _request(self, body: dict[str, Any]) -> Completion:
        self._count("requests")
        try:
            status, headers, content = self._post(body)
        except httpx.TimeoutException:
            self._count("late")
            raise _Failed("timeout", f"no answer within {self._timeout_seconds:g} s") from None
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            self._count("unreachable")
            raise _Failed("error", f"{self._url} cannot be reached: {type(error).__name__}") from None
        if status != 200:
            self._count(f"http_{status}")
        if status in _OUR_FAULT or status == _NOT_FOUND:
            refusal = RewardError(
                f"the endpoint at {self._url} refuses (HTTP {status}): check {self._section}.url, model and api_key_file"
            )
            if status == _NOT_FOUND:
                raise _Failed("error", f"HTTP {status}", _retry_after(headers), refusal)
            raise refusal
        if status in _PASSING:
            raise _Failed("error", f"HTTP {status}", _retry_after(headers))
        if status != 200:
            raise NoCompletion("error", f"HTTP {status}: {content[:200]!r}")
        return self._completion(content)

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Read the reply in pieces: httpx limits the wait for each piece only, which lets a slow server take for ever."""
        deadline = time.monotonic() + self._timeout_seconds
        with self._client.stream("POST", f"{self._url}/chat/completions", json=body) as response:
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the whole reply took too long")
                if len(content) > _MAX_REPLY_BYTES:
                    raise httpx.ReadError("the reply is too long")
            return response.status_code, response.headers, bytes(content)

    def _completion(self, content: bytes) -> Completion:
        try:
            reply = json.loads(content)
            choice = reply["choices"][0]
            message, finish_reason = choice["message"], choice["finish_reason"]
            cut = finish_reason == "length"
            text = message["content"]
            if text is None and cut:  # cut in its reasoning, which some servers return apart
                text = ""
            if not (cut or finish_reason == "stop") or not isinstance(text, str):
                raise ValueError(f"finish_reason is {finish_reason!r}")
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            usage = reply.get("usage") or {}
            for name in ("prompt_tokens", "completion_tokens"):
                self._count(name, int(usage.get(name) or 0))
            return Completion(text, not cut, str(reasoning), int(usage.get("completion_tokens") or 0) or None)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            self._count("invalid")
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise _Failed("error", f"the reply is no chat completion ({reason})") from None

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[name] += amount


def _back_off(attempt: int) -> float:
    """Seconds before the next attempt: they double, and are drawn from the upper half, so that callers do not return together."""
    return min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempt) * random.uniform(0.5, 1.0)


def _retry_after(headers: httpx.Headers) -> float:
    """The pause in seconds that the server asks for, up to the longest pause. Dates in the header are ignored."""
    value = headers.get("retry-after", "")
    return min(float(value), _LONGEST_PAUSE_SECONDS) if value.isascii() and value.isdigit() else 0.0


def read_api_key(path: str | None, setting: str) -> str | None:
    """The key in a file; None if no file is named.

    Raises:
        ConfigError: the file cannot be read. The message names the setting.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} {path} cannot be read: {error}") from None
