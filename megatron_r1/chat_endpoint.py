"""An OpenAI-compatible chat endpoint: one request with a whole-call time limit, retried where that can help."""

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
_OUR_FAULT = {401, 403, 404, 405}  # no request will ever succeed
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_MAX_REPLY_BYTES = 16 << 20


@dataclass(frozen=True)
class Completion:
    """What a chat model said."""

    text: str
    finished: bool  #: ended by itself; False: cut at max_tokens
    reasoning: str = ""  #: what some servers give apart from the text
    tokens: int | None = None  #: of the whole output, reasoning included; None: the server does not tell


class NoCompletion(Exception):
    """All attempts failed. `outcome` is "timeout" where the last one was late, else "error"; the text is one line."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


class _Failed(Exception):
    """One attempt failed in a way that another may not."""

    def __init__(self, outcome: str, reason: str, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.outcome, self.pause_seconds = outcome, pause_seconds


class ChatEndpoint:
    """`POST <url>/chat/completions`. Safe to use from many threads. Proxies of the environment are not used.

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
        unlimited = httpx.Limits(max_connections=None)  # whoever calls limits how many do so at a time
        self._client = httpx.Client(headers=headers, timeout=timeout_seconds, limits=unlimited, trust_env=False)
        self._closing = threading.Event()
        self._pause = pause or self._closing.wait
        self._lock = threading.Lock()

    def complete(self, request: dict[str, Any], read: Callable[[str], T]) -> tuple[str, T]:
        """The model's whole output, and what `read` makes of it. One that was cut at the limit counts as a failed attempt.

        Args:
            request: body of the request; the seed goes up with every attempt, else a model that is sampled greedily repeats itself.
            read: raises ValueError on an output that is no answer, which counts as a failed attempt.

        Raises:
            NoCompletion: every attempt failed.
            RewardError: the endpoint refuses the key, the path or the model.
        """

        def take(completion: Completion) -> tuple[str, T]:
            if not completion.finished:
                raise ValueError("finish_reason is 'length'")
            return completion.text, read(completion.text)

        return self._try(request, take)

    def sample(self, request: dict[str, Any]) -> Completion:
        """One response, also one that was cut at the limit. Raises as `complete` does."""
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
                if attempt == self._retries or self._closing.is_set():
                    raise NoCompletion(failed.outcome, f"{failed} ({attempt + 1} attempts)") from None
                self._count("retries")
                self._pause(max(failed.pause_seconds, _back_off(attempt)))
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Let no attempt follow, and close the connections."""
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
        if status in _OUR_FAULT:
            raise RewardError(
                f"the endpoint at {self._url} refuses (HTTP {status}): check {self._section}.url, model and api_key_file"
            )
        if status in _PASSING:
            raise _Failed("error", f"HTTP {status}", _retry_after(headers))
        if status != 200:
            raise NoCompletion("error", f"HTTP {status}: {content[:200]!r}")
        return self._completion(content)

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Read the reply piecewise: httpx limits the wait for each piece, which a slow server can stretch for ever."""
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
            if text is None and cut:  # cut while it was reasoning, which some servers give apart
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
    """Seconds before the next attempt: doubling, at random between half and the whole, so that callers do not come back together."""
    return min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempt) * random.uniform(0.5, 1.0)


def _retry_after(headers: httpx.Headers) -> float:
    """What the server asks for, in seconds; other forms of the header (dates) and more than the longest pause are not followed."""
    value = headers.get("retry-after", "")
    return min(float(value), _LONGEST_PAUSE_SECONDS) if value.isascii() and value.isdigit() else 0.0


def read_api_key(path: str | None, setting: str) -> str | None:
    """The key in a file; None where none is named.

    Raises:
        ConfigError: the file cannot be read; names the setting.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} {path} cannot be read: {error}") from None
