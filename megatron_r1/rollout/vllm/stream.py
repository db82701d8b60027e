"""Sampling with prompts that come while others are computed. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from megatron_r1.rollout.channel.engine_channel import ASK
from megatron_r1.rollout.vllm.progress import SignsOfProgress

Answer = tuple[np.ndarray, np.ndarray, bool]  #: int32 token ids, their float32 log-probs, ended with end-of-sequence or a stop text
Request = tuple[int, list[int], list[int | None]]  #: position in the batch, token ids, a seed for each response (None: greedy)


Say = Callable[[np.ndarray, np.ndarray], bool]  #: takes new tokens and their log-probs of one response; whether more are wanted


class RequestEngine(Protocol):
    """An engine that computes many requests at the same time."""

    def add(self, request_id: str, token_ids: list[int], seed: int | None) -> None:
        """Let a request wait for its turn."""

    def step(self) -> list[tuple[str, Answer]]:
        """Compute one token of each request that runs; those that are finished by it."""

    def waiting(self) -> int:
        """Number of requests that have no room yet."""

    def progress(self) -> object:
        """What changes with every step that computes something."""


class PromptFeed:
    """The engine's end of a call to sample: the prompts that came with it, and further ones that it asks the trainer for.

    Args:
        is_last: there are none beside the `first`.
    """

    def __init__(self, connection: Connection, first: list[Request], is_last: bool) -> None:
        self._connection, self._here, self._is_last = connection, first, is_last
        self._asked = False

    def ask(self) -> None:
        """Ask for more, unless there are none or the answer to an earlier question is on its way."""
        if not (self._is_last or self._asked):
            self._asked = True
            self.send(ASK)

    def read(self, wait: bool) -> list[Request] | None:
        """New requests; none if there is no room at the trainer's for more. None: no answer has come.

        Args:
            wait: for the answer to a question.
        """
        if self._here:
            here, self._here = self._here, []
            return here
        if not (self._asked and (wait or self._connection.poll(0))):
            return None
        requests, self._is_last = self._connection.recv()
        self._asked = False
        return requests

    def send(self, part: Any) -> None:
        """Send the trainer a part of the answer; None is a sign of life."""
        self._connection.send((None, part))

    def close(self) -> None:
        """Leave nothing on the connection that the next call would take for its own."""
        self.read(wait=True)


def sample_stream(engine: RequestEngine, feed: PromptFeed, samples: int) -> None:
    """Sample `samples` responses to each prompt of the feed, and send (position, answers) as soon as a prompt has all of them.

    The engine asks for more when nothing waits in it: what it holds is what it computes, and other engines get the rest. After an
    answer without prompts it asks again when it has finished one. While it computes, it gives signs of life.
    """
    answers: dict[int, dict[int, Answer]] = {}
    may_ask = True
    signs = SignsOfProgress(engine.progress, lambda: feed.send(None))
    while True:
        if may_ask and not engine.waiting():
            feed.ask()
        requests = feed.read(wait=not answers)
        for position, token_ids, seeds in requests or ():
            answers[position] = {}
            for sample, seed in enumerate(seeds):
                engine.add(str(position * samples + sample), token_ids, seed)
        if requests is not None:
            may_ask = bool(requests)
        if not answers:
            return
        signs.look()
        for request_id, answer in engine.step():
            position, sample = divmod(int(request_id), samples)
            answers[position][sample] = answer
            if len(answers[position]) == samples:
                row = answers.pop(position)
                feed.send((position, [row[index] for index in range(samples)]))
                may_ask = True


def say_to(connection: Connection) -> Say:
    """Send the trainer's side what an engine says of one response, and ask each time whether more is wanted."""

    def say(token_ids: np.ndarray, logprobs: np.ndarray) -> bool:
        connection.send((None, (token_ids, logprobs)))
        connection.send((None, ASK))
        return connection.recv()

    return say
