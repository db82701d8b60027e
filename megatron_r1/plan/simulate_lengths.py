"""Where the lengths of a simulated round come from: a distribution, or the responses that a run has recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_r1.data.unpacked import open_unpacked
from megatron_r1.errors import ConfigError, DataError, one_line
from megatron_r1.runtime.rollout_files import list_rollouts, step_of_file

LONGEST = 1 << 30  #: tokens; what is longer is a slip of the pen


class LengthSource(Protocol):
    """A source of lengths."""

    def draw(self, groups: int, group_size: int, random: np.random.Generator) -> np.ndarray:
        """int64 [groups, group_size]: tokens of each response, at least 1."""


@dataclass(frozen=True)
class Equal:
    """All responses are equally long."""

    tokens: int

    def draw(self, groups: int, group_size: int, random: np.random.Generator) -> np.ndarray:
        """See `LengthSource`."""
        return np.full((groups, group_size), self.tokens, np.int64)


@dataclass(frozen=True)
class Lognormal:
    """Lengths whose logarithm is normal, cut at a limit: many short responses, and a tail of long ones."""

    mean: float  #: tokens, of lengths that are not cut
    sigma: float  #: standard deviation of the logarithm
    limit: int  #: tokens, as `rollout.max_response_tokens`
    shared: float = 0.0  #: part of that variance which responses to one prompt have in common

    def draw(self, groups: int, group_size: int, random: np.random.Generator) -> np.ndarray:
        """See `LengthSource`."""
        of_prompt, of_response = random.standard_normal((groups, 1)), random.standard_normal((groups, group_size))
        normal = math.sqrt(self.shared) * of_prompt + math.sqrt(1 - self.shared) * of_response
        lengths = np.exp(np.minimum(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * normal, math.log(LONGEST)))
        return np.clip(np.rint(lengths), 1, self.limit).astype(np.int64)


@dataclass(frozen=True)
class Recorded:
    """Lengths of a run's prompts: a prompt is drawn, then its responses' lengths, with replacement."""

    prompts: tuple[np.ndarray, ...]  #: int64 lengths of each prompt's responses

    def draw(self, groups: int, group_size: int, random: np.random.Generator) -> np.ndarray:
        """See `LengthSource`. As many as a prompt has are taken as they are, so that a group's own spread stays."""
        chosen = random.integers(len(self.prompts), size=groups)
        rows = [self.prompts[at] for at in chosen]
        return np.stack([row if len(row) == group_size else random.choice(row, group_size) for row in rows])


class Replayed:
    """The rounds of a run as they were, in their order; whoever asks for more than there were gets the first again."""

    def __init__(self, rounds: Sequence[Sequence[np.ndarray]]) -> None:
        self._rows = [row for groups in rounds for row in groups]
        self._at = 0

    def draw(self, groups: int, group_size: int, random: np.random.Generator) -> np.ndarray:
        """See `LengthSource`. Raises ConfigError if the run's groups are of another size."""
        rows = [self._rows[(self._at + number) % len(self._rows)] for number in range(groups)]
        self._at += groups
        if any(len(row) != group_size for row in rows):
            raise ConfigError(f"the run's prompts do not have {group_size} responses each: replay it with its own grpo.group_size")
        return np.stack(rows)


def recorded_lengths(run: Path) -> dict[int, list[np.ndarray]]:
    """Step -> the lengths of each prompt's responses, in the order of prompts, from `rollouts/` of a run folder.

    Raises DataError: there is no such folder, or a file in it is malformed.
    """
    files = list_rollouts(run)
    if not files:
        raise DataError(f"{run} has no rollouts/step_*.jsonl: give the run folder of grpo")
    return {step_of_file(path): _read_groups(path) for path in files}


def _read_groups(path: Path) -> list[np.ndarray]:
    groups: list[list[int]] = []
    before: str | None = None
    try:
        with open_unpacked(path) as file:
            for number, line in enumerate(file, start=1):
                prompt, length = _read_length(line, path, number)
                if prompt != before:
                    groups.append([])
                    before = prompt
                groups[-1].append(length)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}): remove the file") from None
    if not groups:
        raise DataError(f"{path} holds no responses: remove the file")
    size = min(map(len, groups))  # a prompt may come twice in a round, one after the other
    return [np.array(group[at : at + size], np.int64) for group in groups for at in range(0, len(group), size)]


def _read_length(line: bytes, path: Path, number: int) -> tuple[str, int]:
    try:
        record = json.loads(line)
        prompt, length = str(record["prompt_id"]), record["length"]
        if type(length) is not int or not 0 < length <= LONGEST:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{path} line {number} is not a response with prompt_id and length: remove the file") from None
    return prompt, length


def parse_lengths(text: str, limit: int) -> LengthSource:
    """What `--lengths` says: equal:N, lognormal:MEAN,SIGMA[,SHARED], replay:RUN, or a run folder.

    Args:
        limit: tokens that a response is cut at.

    Raises ConfigError, DataError.
    """
    kind, _, rest = text.partition(":")
    if kind == "equal":
        (tokens,) = _read_numbers(text, rest, 1, 1)
        if tokens != int(tokens) or not 1 <= tokens <= limit:
            raise ConfigError(f"--lengths {text}: {rest} is no whole number of tokens from 1 to the limit of {limit:,}")
        return Equal(int(tokens))
    if kind == "lognormal":
        mean, sigma, *shared = _read_numbers(text, rest, 2, 3)
        if not 1 <= mean <= LONGEST or not 0 <= sigma <= 10 or not 0 <= sum(shared) <= 1:
            raise ConfigError(f"--lengths {text}: a mean of at least 1 token, a sigma from 0 to 10 and a shared part from 0 to 1")
        return Lognormal(mean, sigma, limit, *shared)
    replays = kind == "replay" and bool(rest)
    folder = Path(rest if replays else text)
    if not folder.is_dir():
        raise ConfigError(f"--lengths {text}: no run folder, and not equal:TOKENS, lognormal:MEAN,SIGMA[,SHARED] or replay:RUN_DIR")
    rounds = list(recorded_lengths(folder).values())
    longest = max(int(group.max()) for groups in rounds for group in groups)
    if longest > limit:
        raise ConfigError(f"--lengths {text}: it has responses of {longest:,} tokens, the limit is {limit:,}: raise --limit")
    return Replayed(rounds) if replays else Recorded(tuple(group for groups in rounds for group in groups))


def _read_numbers(text: str, rest: str, least: int, most: int) -> list[float]:
    try:
        numbers = [float(part) for part in rest.split(",")]
    except ValueError:
        numbers = []
    if not least <= len(numbers) <= most or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"--lengths {text}: give equal:TOKENS or lognormal:MEAN,SIGMA[,SHARED], as in lognormal:4000,0.8")
    return numbers
