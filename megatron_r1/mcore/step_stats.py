"""What one update reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_r1.mcore.collectives import all_reduce
from megatron_r1.mcore.parallel import Groups
from megatron_r1.types import Metric


@dataclass(frozen=True)
class StepStats:
    """What one update reports; the same on every rank."""

    loss: float
    grad_norm: float  #: before clipping
    lr: float
    metrics: dict[str, Metric[float]]  #: the loss callable's, over the whole minibatch, and those of `moe`, if it has an effect
    tokens: int  #: positions computed, padding included
    flops: float = 0.0  #: of the whole minibatch, see `model.flops`; 0: it was not applied
    applied: bool = True  #: False: weights are as before, and there are no metrics; if it was not finite, loss and norm are NaN
    skipped: int | None = None  #: updates of the run that were not applied so far; None: none may be left out, see `LeftOut`


def mtp_metric(
    modules: Sequence[torch.nn.Module], groups: Groups, trained_tokens: float, device: torch.device, *, trained: bool
) -> dict[str, Metric[float]]:
    """The multi-token-prediction loss per trained token, on every rank; empty if it is not trained. Collective."""
    if not trained:
        return {}
    none = torch.zeros((), device=device)
    # The block is on the last pipeline stage alone.
    loss = sum((none if m.mtp_loss is None else m.mtp_loss for m in modules), none).double()
    all_reduce(loss, group=groups.dp_cp)
    all_reduce(loss, group=groups.pp)
    return {"mtp/loss": Metric(loss.item() / (trained_tokens or 1), "update_mean")}
