"""From what losses report of their minibatches to the metrics of a step."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.training.protocols import Stats


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
