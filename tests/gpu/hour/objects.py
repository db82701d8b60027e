"""Part 10: what it costs to pickle the tokens and log-probabilities of a round, as lists and as arrays."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import numpy as np

from tests.gpu.hour.ground import Ground


def run(ground: Ground) -> None:
    """A share of a round of 67 million tokens, so that lists fit the limit: figures are per million tokens."""
    count = ground.pick(8_000_000, 50_000)
    tokens = np.random.default_rng(0).integers(0, 129_280, count, dtype=np.int32)
    logprobs = np.random.default_rng(1).random(count, dtype=np.float32)
    _measure(ground, "arrays", lambda: (tokens, logprobs), count)
    as_lists = (tokens.tolist(), logprobs.tolist())
    _measure(ground, "lists", lambda: as_lists, count)


def _measure(ground: Ground, name: str, value: Callable[[], tuple], count: int) -> None:
    started = time.perf_counter()
    packed = pickle.dumps(value(), protocol=pickle.HIGHEST_PROTOCOL)
    written = time.perf_counter()
    loaded = pickle.loads(packed)
    read = time.perf_counter()
    ground.check(f"{name}: as many come back", len(loaded[0]) == len(loaded[1]) == count)
    ground.say(f"{name}: bytes a token", len(packed) / count, "B")
    ground.say(f"{name}: pickle", (written - started) / count * 1e9, "ms a million tokens")
    ground.say(f"{name}: unpickle", (read - written) / count * 1e9, "ms a million tokens")
    ground.say(f"{name}: a round of 67 million tokens, both ways", (read - started) / count * 67.1e6, "s")
