"""Asks a served model to write data, in many requests; every answer is kept as soon as it arrives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, Self

from megatron_r1.chat_endpoint import ChatEndpoint, Completion, NoCompletion, read_api_key
from megatron_r1.config.curation import WriterConfig
from megatron_r1.errors import ConfigError, RolloutError
from megatron_r1.runtime.ledger import Ledger
from megatron_r1.runtime.progress import Progress
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

Messages = list[dict[str, str]]  #: as the chat completions protocol has them
_SECTION = "curation.writer"


class Writer(Protocol):
    """A `ServedWriter`."""

    concurrency: int  #: requests at a time

    def ask(self, messages: Messages, seed: int) -> Future[Completion]:
        """Start answering. The future raises NoCompletion if the model does not answer."""


class ServedWriter:
    """Asks an endpoint, `config.concurrency` requests at a time. Use it as a context manager, or call `close`.

    Args:
        pause: replaces the waiting between retries, for tests.

    Raises:
        ConfigError: url or model is not set, or the key cannot be read.
    """

    def __init__(self, config: WriterConfig, pause: Callable[[float], object] | None = None) -> None:
        if not config.model or not config.url or not config.url.startswith(("http://", "https://")):
            raise ConfigError(f"{_SECTION}: url begins with http:// or https://, and model names what it serves")
        key = read_api_key(config.api_key_file, f"{_SECTION}.api_key_file")
        self.concurrency = config.concurrency
        self._config = config
        self._endpoint = ChatEndpoint(config.url, key, config.timeout_seconds, config.retries, _SECTION, pause)
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="writer")

    def ask(self, messages: Messages, seed: int) -> Future[Completion]:
        """See `Writer`. The future raises RewardError if the endpoint refuses every request."""
        request = {
            "model": self._config.model,
            "messages": messages,
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            "seed": seed,
        }
        return self._threads.submit(self._endpoint.sample, request)

    def close(self) -> None:
        """Drop waiting requests, and end after those that are under way. Safe to call twice."""
        self._endpoint.close()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask_all(writer: Writer, requests: Mapping[str, Messages], ledger: Ledger, seed: int, description: str) -> dict[str, str]:
    """The answers to all requests that have one: those of the ledger, and new ones, which are appended to it at once.

    An answer that was cut at the limit or is blank is kept as none: asked again, it would most likely be the same.

    Args:
        requests: id -> what is asked.

    Returns:
        id -> the whole answer; reasoning that the server gives apart stands in think tags before it.

    Raises:
        RolloutError: the model does not answer. What came is kept: the same command continues from there.
        RewardError: the endpoint refuses the key, the path or the model.
    """
    missing = [id for id in requests if id not in ledger.records]
    with Progress(len(requests), description, initial=len(requests) - len(missing)) as progress:
        for answers in _stream_answers(writer, ((id, requests[id]) for id in missing), seed, ledger):
            ledger.append(answers)
            progress.advance(len(answers))
    answers = {id: ledger.records[id]["answer"] for id in requests}
    return {id: answer for id, answer in answers.items() if answer is not None}


def _stream_answers(
    writer: Writer, requests: Iterable[tuple[str, Messages]], seed: int, ledger: Ledger
) -> Iterable[list[dict[str, Any]]]:
    """Yield records as they come. After a request that fails for good no other is sent; those under way are still taken."""
    left = iter(requests)
    failure: NoCompletion | None = None
    under_way: dict[Future[Completion], str] = {}
    while True:
        while failure is None and len(under_way) < writer.concurrency:
            id, messages = next(left, (None, []))
            if id is None:
                break
            under_way[writer.ask(messages, random.Random(f"writer {seed} {id}").getrandbits(31))] = id
        if not under_way:
            break
        ready = []
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            id = under_way.pop(future)
            try:
                ready.append({"id": id, "answer": _usable_answer(future.result())})
            except NoCompletion as error:
                failure = failure or error
        yield ready
    if failure is not None:
        raise RolloutError(
            f"the writing model gives no answer ({failure}); {len(ledger.records)} answers are kept in {ledger.path}, and the same "
            "command goes on from there"
        )


def _usable_answer(completion: Completion) -> str | None:
    if not completion.finished or not completion.text.strip():
        return None
    reasoning = completion.reasoning.strip()
    return f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{completion.text}" if reasoning else completion.text
