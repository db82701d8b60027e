"""Responses to one prompt packed so that they share its tokens: which samples go together, and what they take together.

A bundle is a prompt and responses to it in one micro-batch. The prompt stands there once, without its last token; with that each
response begins, since it predicts the response's first. Nothing is trained on what is shared. Planned from lengths alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megatron_r1.types import TrainingSample, round_up

#: Most cells of the attention mask of one response, its tokens times all before them: 64 MiB. A response that needs more shares
#: nothing: it is so long that its prompt hardly counts.
MOST_CELLS = 1 << 26


def shared_tokens(sample: TrainingSample) -> int:
    """Tokens at the beginning of the sample that it may share with others of its group; 0: none."""
    if sample.group is None or not isinstance(sample.loss_mask, slice):
        return 0
    before = sample.loss_mask.indices(sample.num_targets)[0]
    return before if (sample.num_targets - before) * sample.num_targets <= MOST_CELLS else 0


def bundle_tokens(samples: Sequence[TrainingSample], bundle: Sequence[int], multiple: int = 1) -> int:
    """Positions that the bundle takes, if each of its sequences takes a multiple of `multiple`."""
    shared = shared_tokens(samples[bundle[0]]) if len(bundle) > 1 else 0
    parts = [shared, *(samples[number].num_targets - shared for number in bundle)]
    return sum(round_up(part, multiple) for part in parts)


def bundle_samples(
    samples: Sequence[TrainingSample], numbers: Sequence[int], max_tokens: int, multiple: int = 1
) -> list[list[int]]:
    """Bundles of at most `max_tokens` positions that hold each of `numbers` once, equal parts of a group that needs several.

    Each sequence takes a multiple of `multiple` positions, of which `max_tokens` is one. No sample has more targets than that.
    """
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for number in numbers:
        sample = samples[number]
        before = shared_tokens(sample)
        key = (0, sample.group, before) if before and sample.group is not None else (1, number, 0)
        groups[key].append(number)
    bundles = []
    for (_, _, before), members in groups.items():
        room = max_tokens - round_up(before, multiple)
        own = {number: round_up(samples[number].num_targets - before, multiple) for number in members}
        # One that has no room beside its prompt, each in whole multiples, has room in one piece.
        alone = [number for number in members if len(members) == 1 or own[number] > room]
        bundles += [[number] for number in alone]
        if len(alone) < len(members):
            bundles += _even_parts({number: own[number] for number in members if number not in alone}, room)
    return bundles


def _even_parts(own: dict[int, int], room: int) -> list[list[int]]:
    """As few parts of at most `room` tokens as longest-first filling of the emptiest part needs."""
    order = sorted(own, key=lambda number: -own[number])
    count = -(-sum(own.values()) // room) or 1
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for number in order:
            emptiest = loads.index(min(loads))
            parts[emptiest].append(number)
            loads[emptiest] += own[number]
        if max(loads) <= room:
            return [part for part in parts if part]
        count += 1
