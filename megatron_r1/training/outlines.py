"""What every rank knows of a batch of groups: lengths and scores. Texts, tokens and log-probs stay where they were sampled."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch

from megatron_r1.errors import RolloutError
from megatron_r1.rewards.protocol import OUTCOMES
from megatron_r1.runtime.distributed import gather_objects, world_size
from megatron_r1.runtime.exchange import add_tables, stream_to_rank_zero
from megatron_r1.types import Prompt, Rollout, RolloutGroup, filled, hollow

_ABSENT = 0.0  # of a component that a group lacks


def share_outlines(own: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> list[RolloutGroup]:
    """The groups of all prompts, in their order: this rank's `own` as they are, and outlines of the others'. Collective.

    The ranks exchange two tables of numbers, of `outline_bytes` together.

    Args:
        own: scored groups; together, the ranks have one for every prompt.
        prompts: of the whole batch, the same on every rank.

    Raises:
        RolloutError: a prompt was sampled by no rank, or by several.
    """
    if world_size() == 1 and len(own) == len(prompts):
        return list(own)
    per_group = np.zeros((len(prompts), 5))
    for group in own:
        size = len(group.rollouts)
        per_group[group.position] += (1, size, group.weights_version, group.reward_magnitude, group.owner)
    sampled, sizes, *_ = (per_group := add_tables(per_group)).T
    if (sampled != 1).any():
        at = int(np.flatnonzero(sampled != 1)[0])
        raise RolloutError(f"prompt {prompts[at].id!r} was not sampled by exactly one rank")
    starts = np.cumsum([0, *sizes]).astype(int)
    names = _shared_names(own)
    rows = np.zeros((starts[-1], 3 + 2 * len(names)))
    for group in own:
        rows[starts[group.position] : starts[group.position + 1]] = _rows_of(group, names)
    rows = add_tables(rows)
    held = {group.position: group for group in own}
    return [
        held.get(position) or _outline(position, prompt, per_group[position], rows[start:end], names)
        for position, (prompt, start, end) in enumerate(zip(prompts, starts[:-1], starts[1:], strict=True))
    ]


def outline_bytes(num_prompts: int, group_size: int, components: int) -> int:
    """Bytes that `share_outlines` adds up on every rank, whatever the number of ranks and of tokens."""
    return 8 * num_prompts * (5 + group_size * (3 + 2 * 2 * components))


def _shared_names(own: Sequence[RolloutGroup]) -> list[tuple[str, str]]:
    """(field, name) of all ranks' reward components: a few words a rank, however many the responses."""
    mine = dict.fromkeys(("reward_parts", name) for group in own for name in group.reward_parts)
    mine |= dict.fromkeys(("reward_outcomes", name) for group in own for name in group.reward_outcomes)
    return list(dict.fromkeys(name for of_rank in gather_objects(tuple(mine)) for name in of_rank))


def _rows_of(group: RolloutGroup, names: Sequence[tuple[str, str]]) -> np.ndarray:
    """[G, 3 + 2 names]: length, finished, reward; then for every component whether the group has it, and what it is."""
    columns = [
        [float(len(rollout.token_ids)) for rollout in group.rollouts],
        [float(rollout.finished) for rollout in group.rollouts],
        filled(group.rewards_G).tolist(),
    ]
    for field, name in names:
        values = getattr(group, field).get(name)
        columns.append([_ABSENT if values is None else 1.0] * len(group.rollouts))
        if values is None:
            columns.append([0.0] * len(group.rollouts))
        elif field == "reward_outcomes":
            columns.append([float(OUTCOMES.index(value)) for value in values])
        else:
            columns.append([np.nan if value is None else value for value in values])
    return np.array(columns).T


def _outline(
    position: int, prompt: Prompt, numbers: np.ndarray, rows: np.ndarray, names: Sequence[tuple[str, str]]
) -> RolloutGroup:
    lengths, finished, rewards = rows[:, :3].T
    rollouts = [
        Rollout(hollow(int(length), np.int32), hollow(int(length), np.float32), "", bool(done))
        for length, done in zip(lengths, finished, strict=True)
    ]
    _, _, version, magnitude, owner = numbers
    group = RolloutGroup(prompt, rollouts, int(version), torch.from_numpy(rewards.copy()))
    group.position, group.owner, group.reward_magnitude = position, int(owner), float(magnitude)
    for number, (field, name) in enumerate(names):
        has, values = rows[:, 3 + 2 * number : 5 + 2 * number].T
        if has[0] == _ABSENT:
            continue
        if field == "reward_outcomes":
            group.reward_outcomes[name] = [OUTCOMES[int(value)] for value in values]
        else:
            group.reward_parts[name] = [None if np.isnan(value) else float(value) for value in values]
    return group


def stream_groups(owners: Sequence[int], own: Sequence[RolloutGroup]) -> Generator[RolloutGroup, None, None]:
    """The groups of a batch with their texts, for work that rank 0 does alone: there, in the order of prompts. Collective.

    All ranks go through the iterator to its end or close it; it is empty on the others. Rank 0 receives one group at a time.

    Args:
        owners: rank of every group, the same on every rank.
        own: the groups of this rank.
    """
    held = {group.position: group for group in own}
    return stream_to_rank_zero(owners, held.__getitem__)
