"""From what losses report of their minibatches to the metrics of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_r1.runtime.distributed import rank
from megatron_r1.runtime.exchange import add_tables
from megatron_r1.training.protocols import Stats
from megatron_r1.types import RolloutGroup


def update_metrics(stats: Stats) -> dict[str, float]:
    """What a step of one update reports: loss, gradient norm, learning rate and, if updates may be left out, how many were."""
    skipped = {} if stats.skipped is None else {"updates/skipped": stats.skipped}
    return {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, **skipped}


def loss_metrics(updates: Sequence[Stats], *, tokens: int, samples: int) -> dict[str, float]:
    """Name -> the step's number, over all its updates; see `types.Reduction`.

    Args:
        updates: those that were applied; of none there is nothing to report.
        tokens: trained tokens of the step.
        samples: samples of the step: responses, pairs, labelled responses.
    """
    divisors = {"sum": 1, "token_mean": tokens, "sample_mean": samples, "update_mean": len(updates)}
    step = {}
    for name, first in updates[0].metrics.items() if updates else ():
        values = [update.metrics[name].value for update in updates]
        step[name] = max(values) if first.reduction == "max" else sum(values) / divisors[first.reduction]
    return step


def pooled_mean(counts: np.ndarray, means: np.ndarray) -> float:
    """The mean over all ranks' values, from [ranks] counts and means. If one rank has all values, its own mean to the bit."""
    has = counts > 0
    if has.sum() < 2:
        return float(means[has][0]) if has.any() else math.nan
    return float((counts[has] * means[has]).sum() / counts[has].sum())


def mean_sampled_logprob(groups: Sequence[RolloutGroup]) -> float:
    """Mean over all sampled tokens of all ranks. Collective.

    Args:
        groups: of the whole batch, other ranks' as outlines.

    Added up one after the other, in the order of prompts; if several ranks sampled, first within each response. So the last digit
    does not depend on which of them sampled what.
    """
    owners = {group.owner for group in groups}
    sums = np.zeros(1 if len(owners) == 1 else sum(len(group.rollouts) for group in groups))
    at = 0
    for group in groups:
        for rollout in group.rollouts:
            if group.owner == rank() and len(rollout.rollout_logprobs):
                sums[at] = _add_up(sums[at], rollout.rollout_logprobs)
            at += len(owners) > 1
    tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    return sum(add_tables(sums).tolist()) / tokens if tokens else math.nan


def _add_up(start: float, values: np.ndarray) -> float:
    """start + values[0] + values[1] + ..., in that order and in float64, as Python's sum does."""
    return float(np.add.accumulate(np.concatenate([[start], values]))[-1])
