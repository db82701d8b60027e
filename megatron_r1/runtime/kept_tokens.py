"""Token ids and log-probs of a step's responses, as the file of its responses keeps them: compactly, of as many as a budget allows.

A response's line gets `"tokens": {"ids": ..., "engine": ..., "trainer_minus_engine": ...}`, each base64 of little-endian numbers:
int32 ids, float16 natural log-probs of the engine (relative error 2^-11) and float16 differences. Lines without it, of older runs
or beyond the budget, are as they always were.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.runtime.choose_responses import Candidate, choose_responses
from megatron_r1.runtime.distributed import rank
from megatron_r1.runtime.exchange import add_tables, move_arrays
from megatron_r1.types import RolloutGroup, TrainingSample

KEY = "tokens"
#: What a token takes in a file that is not compressed: 4 + 2 + 2 bytes, four characters for three bytes.
BYTES_PER_TOKEN = (4 + 2 + 2) * 4 / 3


@dataclass(frozen=True)
class TokenColumns:
    """The tokens of one response."""

    ids: np.ndarray  #: [T] int32
    engine: np.ndarray  #: [T] float32 log-probs of the engine that sampled them
    #: [T] float32 log-prob of the trainer before the round's updates, minus the engine's; None: unknown
    difference: np.ndarray | None

    @property
    def largest_difference(self) -> float:
        """In nats; infinite if one is not a number, NaN if they are not known."""
        if self.difference is None or not len(self.difference):
            return math.nan
        return float(np.nan_to_num(np.abs(self.difference), nan=np.inf, posinf=np.inf).max())

    def part(self, first: int, last: int) -> TokenColumns:
        """The first and the last ones."""
        picked = np.r_[0:first, max(len(self.ids) - last, first) : len(self.ids)]
        return TokenColumns(self.ids[picked], self.engine[picked], None if self.difference is None else self.difference[picked])

    def to_json(self) -> dict[str, str]:
        """What a line holds."""
        columns = {"ids": _to_base64(self.ids, "<i4"), "engine": _to_base64(self.engine, "<f2")}
        return columns if self.difference is None else columns | {"trainer_minus_engine": _to_base64(self.difference, "<f2")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TokenColumns:
        """Raises ValueError, KeyError or TypeError if a line does not hold columns of equal length."""
        ids, engine = _from_base64(value["ids"], "<i4"), _from_base64(value["engine"], "<f2").astype(np.float32)
        difference = value.get("trainer_minus_engine")
        columns = cls(ids, engine, None if difference is None else _from_base64(difference, "<f2").astype(np.float32))
        if len(engine) != len(ids) or (columns.difference is not None and len(columns.difference) != len(ids)):
            raise ValueError("the columns of its tokens have different lengths")
        return columns


def keep_tokens(
    groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample], most_bytes: int, seed: int
) -> dict[tuple[int, int], TokenColumns]:
    """(number of the group, number in it) -> tokens, for the chosen responses of this rank's groups. Collective.

    The trainer's log-probs go from the ranks that computed them to those that sampled. For n responses a rank gets a table of 8n
    bytes, and all ranks together send 4 bytes for each token of the chosen ones, at most `most_bytes` * 3/8.

    Args:
        groups: of the whole step, other ranks' as outlines.
        samples: one for every response, in order; without the trainer's log-probs no difference is kept.
        most_bytes: what the tokens may take in the file, see `BYTES_PER_TOKEN`; 0: none are kept.
        seed: decides between equal responses.
    """
    if not most_bytes or not samples:
        return {}
    places = [(number, index) for number, group in enumerate(groups) for index in range(len(group.rollouts))]
    knows_trainer = samples[0].old_logprobs is not None
    differences = np.zeros(len(samples))
    for number, sample in enumerate(samples) if knows_trainer else ():
        if sample.holder == rank():
            differences[number] = _columns(sample).largest_difference
    differences = add_tables(differences) if knows_trainer else np.full(len(samples), math.nan)
    candidates = []
    for (number, index), difference in zip(places, differences.tolist(), strict=True):
        group = groups[number]
        reward = math.nan if group.rewards_G is None else float(group.rewards_G[index])
        length = len(group.rollouts[index].token_ids)
        candidates.append(Candidate(group.prompt.id, reward, difference, length, length * BYTES_PER_TOKEN))
    chosen = list(choose_responses(candidates, most_bytes, seed))
    owners = [groups[places[number][0]].owner for number in chosen]
    trainers: dict[int, list[np.ndarray]] = {}
    if knows_trainer:
        lengths = [[candidates[number].length] for number in chosen]
        trainers = move_arrays([samples[n].holder for n in chosen], owners, lengths, lambda item: [_trainer(samples[chosen[item]])])
    kept = {}
    for item, (chosen_number, owner) in enumerate(zip(chosen, owners, strict=True)):
        if owner == rank():
            place = places[chosen_number]
            rollout = groups[place[0]].rollouts[place[1]]
            above = trainers[item][0].view(np.float32) - rollout.rollout_logprobs if knows_trainer else None
            kept[place] = TokenColumns(rollout.token_ids, rollout.rollout_logprobs, above)
    return kept


def _columns(sample: TrainingSample) -> TokenColumns:
    assert sample.rollout_logprobs is not None, "samples of rollouts have them"
    engine = sample.rollout_logprobs[sample.trained]
    return TokenColumns(sample.token_ids[1:][sample.trained], engine, _trainer(sample) - engine)


def _trainer(sample: TrainingSample) -> np.ndarray:
    assert sample.old_logprobs is not None, "asked for where they are known"
    return np.ascontiguousarray(sample.old_logprobs[sample.trained])


def _to_base64(numbers: np.ndarray, dtype: str) -> str:
    with np.errstate(over="ignore"):  # beyond 65504 is infinite
        return base64.b64encode(numbers.astype(dtype).tobytes()).decode()


def _from_base64(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
