"""From what losses report of their minibatches to the metrics of a step."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.training.protocols import Stats


def loss_metrics(updates: Sequence[Stats], *, tokens: int, samples: int) -> dict[str, float]:
    """Name -> the step's number, over all its updates; see `types.Reduction`.

    Args:
        updates: at least one.
        tokens: trained tokens of the step.
        samples: samples of the step: responses, pairs, labelled responses.
    """
    divisors = {"sum": 1, "token_mean": tokens, "sample_mean": samples}
    step = {}
    for name, first in updates[0].metrics.items():
        values = [update.metrics[name].value for update in updates]
        step[name] = max(values) if first.reduction == "max" else sum(values) / divisors[first.reduction]
    return step
