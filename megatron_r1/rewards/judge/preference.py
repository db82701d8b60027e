"""A judge: a served model that says whether an answer is right, or which of two answers is better.

(R1 v2 (arXiv) Listing 4 and section 3.1.) The model runs elsewhere, e.g. under `vllm serve`; this module only sends requests. A
cache keeps the verdicts. Failures of the judge are outcomes of their own, as everywhere in `rewards`.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from megatron_r1.chat_endpoint import ChatEndpoint, NoCompletion, read_api_key
from megatron_r1.config.rewards import JudgeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.judge.cache import JudgeCache
from megatron_r1.rewards.judge.prompts import (
    GRADE_FORMAT,
    Messages,
    comparing_messages,
    grading_messages,
    read_comparison,
    read_grade,
)
from megatron_r1.rewards.protocol import Outcome, Verdict

T = TypeVar("T")
_SECTION = "reward.judge"
VOTES = 4  #: judgements of one pair (R1 v2 section 3.1)
_DETAIL_CHARACTERS = 500


@dataclass(frozen=True)
class Preference:
    """What the votes on a pair say."""

    difference: float | None  #: mean over the votes of how much the first is better, in [-2, 2]; None if a vote is missing
    outcome: Outcome  #: "correct" if all votes were given, else "error" or "timeout"
    votes: tuple[int | None, ...]  #: how much the first answer is better, in whichever place it was shown
    detail: str = ""


class Judge:
    """Grades and compares, `config.concurrency` requests at a time. Use it as a context manager, or call `close`.

    Raises:
        ConfigError: url or model is not set, or the key cannot be read.
        RewardError: the cache cannot be used.
    """

    def __init__(self, config: JudgeConfig) -> None:
        if not config.url or not config.model:
            raise ConfigError("reward.judge.url and reward.judge.model must be set where a judge is used")
        if not config.url.startswith(("http://", "https://")):
            raise ConfigError(f"reward.judge.url={config.url} does not begin with http:// or https://")
        self._config = config
        self._cache = JudgeCache(Path(config.cache)) if config.cache else None
        key = read_api_key(config.api_key_file, f"{_SECTION}.api_key_file")
        self._endpoint = ChatEndpoint(config.url, key, config.timeout_seconds, config.retries, _SECTION)
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="judge")
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def grade(self, question: str, reference: str, answer: str) -> Future[Verdict]:
        """Is the answer right? 1 or 0. The future raises RewardError if the endpoint refuses every request."""
        return self._threads.submit(self._grade, grading_messages(question, reference, answer))

    def compare(self, question: str, first: str, second: str) -> Future[Preference]:
        """Which answer is better? Four votes, two in either order; seed and pair decide the sequence."""
        votes = [False, False, True, True]
        random.Random(f"{self._config.seed}/{question}/{first}/{second}").shuffle(votes)
        futures = [
            self._threads.submit(
                self._vote, comparing_messages(question, *((second, first) if swap else (first, second))), swap, vote
            )
            for vote, swap in enumerate(votes)
        ]
        return _when_done(futures, _mean_vote)

    def statistics(self) -> dict[str, int]:
        """Counts so far: verdicts by outcome, cache hits, requests, retries, failures by kind, tokens."""
        with self._lock:
            return dict(self._counts + self._endpoint.counts)

    def close(self) -> None:
        """Drop the waiting requests, and return when those under way are done. Safe to call twice."""
        self._endpoint.close()
        self._threads.shutdown(cancel_futures=True)
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grade(self, messages: Messages) -> Verdict:
        constraint = {"response_format": GRADE_FORMAT} if self._config.json_schema else {}
        try:
            correct, analysis = self._ask(messages, self._config.seed, read_grade, **constraint)
        except NoCompletion as error:
            verdict = Verdict(None, error.outcome, str(error))
        else:
            detail = " ".join(analysis.split())[:_DETAIL_CHARACTERS]
            verdict = Verdict(1.0, "correct", detail) if correct else Verdict(0.0, "wrong", detail)
        self._count(f"grade_{verdict.outcome}")
        return verdict

    def _vote(self, messages: Messages, swapped: bool, vote: int) -> tuple[int | None, str, str]:
        try:
            difference = self._ask(messages, self._config.seed + vote * (self._config.retries + 1), read_comparison)
        except NoCompletion as error:
            self._count(f"vote_{error.outcome}")
            return None, error.outcome, str(error)
        self._count("vote_correct")
        return (-difference if swapped else difference), "correct", ""

    def _ask(self, messages: Messages, seed: int, read: Callable[[str], T], **constraint: Any) -> T:
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": messages,
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            "seed": seed,
            **constraint,
        }
        kept = self._cache.get(request) if self._cache else None
        if kept is not None:
            self._count("cache_hits")
            return read(kept)  # valid: the cache keeps only what this reader took, since the prompt is part of the key
        output, answer = self._endpoint.complete(request, read)
        if self._cache is not None:
            self._cache.put(request, output)
        return answer

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def _mean_vote(votes: list[tuple[int | None, str, str]]) -> Preference:
    values = tuple(value for value, _, _ in votes)
    missing = next(((outcome, reason) for value, outcome, reason in votes if value is None), None)
    if missing is not None:
        return Preference(None, missing[0], values, missing[1])
    return Preference(sum(values) / len(values), "correct", values)


def _when_done(futures: list[Future[T]], combine: Callable[[list[T]], Preference]) -> Future[Preference]:
    """A future of the combined results. No thread waits for it."""
    combined: Future[Preference] = Future()
    left = [len(futures)]
    lock = threading.Lock()

    def finish(_: Future[T]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        try:
            combined.set_result(combine([future.result() for future in futures]))
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits
            combined.set_exception(error)

    for future in futures:
        future.add_done_callback(finish)
    return combined
