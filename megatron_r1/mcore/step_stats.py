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
    return {"mtp/loss": _per_token([module.mtp_loss for module in modules], groups, trained_tokens, device)}


def entropy_metric(
    modules: Sequence[torch.nn.Module], groups: Groups, trained_tokens: float, device: torch.device
) -> dict[str, Metric[float]]:
    """The entropy of the predicted distribution per trained token, on every rank; empty if it is not measured. Collective."""
    if not getattr(modules[0], "measures_entropy", False):
        return {}
    return {"entropy/exact": _per_token([module.entropy for module in modules], groups, trained_tokens, device)}


def _per_token(sums: Sequence[torch.Tensor | None], groups: Groups, trained_tokens: float, device: torch.device) -> Metric[float]:
    """What the last pipeline stage alone has summed over tokens, over all ranks."""
    none = torch.zeros((), device=device)
    total = sum((none if of_module is None else of_module for of_module in sums), none).double()
    all_reduce(total, group=groups.dp_cp)
    all_reduce(total, group=groups.pp)
    return Metric(total.item() / (trained_tokens or 1), "update_mean")
