"""Which responses of a step are kept or shown where not all fit: of each kind the first ones, in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

#: In turn: the highest reward, the lowest, the token on which trainer and engine differ most, the most tokens, any.
KINDS = ("best", "worst", "largest difference", "longest", "random")
ALL = "all"  #: instead of a kind where all fit


@dataclass(frozen=True)
class Candidate:
    """What is known of a response before it is chosen."""

    prompt_id: str
    reward: float  #: NaN: none
    difference: float  #: the largest |trainer - engine| of its tokens in nats; NaN: not known
    length: int  #: tokens
    size: float  #: bytes that it would take


def choose_responses(candidates: Sequence[Candidate], most_bytes: float, seed: int) -> dict[int, str]:
    """Number of each chosen candidate -> kind, in the order of choice: each kind takes its next one until nothing more fits.

    What does not fit is passed over. Equal ones, and the random ones, stand in an order that seed and prompt alone decide, so that
    a prompt that is sampled again in another step is chosen again. All candidates are chosen if they fit. For n it takes time
    O(n log n) and memory O(n).
    """
    if sum(candidate.size for candidate in candidates) <= most_bytes:
        return dict.fromkeys(range(len(candidates)), ALL)
    prompts = {
        prompt: xxhash.xxh3_64_intdigest(f"{seed}/{prompt}".encode("utf-8", "surrogatepass"))
        for prompt in {c.prompt_id for c in candidates}
    }
    at_random = sorted(range(len(candidates)), key=lambda number: prompts[candidates[number].prompt_id])

    def ranked(values: Sequence[float]) -> list[int]:
        return sorted((number for number in at_random if not math.isnan(values[number])), key=lambda number: -values[number])

    rewards = [candidate.reward for candidate in candidates]
    orders = [
        ranked(rewards),
        ranked([-reward for reward in rewards]),
        ranked([candidate.difference for candidate in candidates]),
        ranked([candidate.length for candidate in candidates]),
        at_random,
    ]
    queues = {kind: iter(order) for kind, order in zip(KINDS, orders, strict=True)}
    chosen: dict[int, str] = {}
    left, passed_over = most_bytes, set[int]()
    while queues:
        for kind, queue in list(queues.items()):
            number = next((number for number in queue if number not in chosen and number not in passed_over), None)
            if number is None:
                del queues[kind]
            elif candidates[number].size <= left:
                chosen[number] = kind
                left -= candidates[number].size
            else:
                passed_over.add(number)
    return chosen
