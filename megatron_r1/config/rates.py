"""What an update is made with: learning rate, speed of the router's biases, weight of multi-token prediction.

All are pure functions of how far a run is, so a run that goes on has the right ones without anything that was saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig


@dataclass(frozen=True)
class Rates:
    """Of one update."""

    lr: float
    bias_update_rate: float  #: step of an expert's routing bias
    mtp_loss_scale: float


#: The rates of an update of a run, by its number from 1.
RatesOf = Callable[[int], Rates]


def constant_but_lr(optimizer: OptimizerConfig, moe: MoeTrainingConfig, total_updates: int) -> RatesOf:
    """The rates of a stage whose learning rate alone changes."""
    lr = learning_rate(optimizer, total_updates)
    return lambda update: Rates(lr(update), moe.bias_update_rate, moe.mtp_loss_scale)


def learning_rate(optimizer: OptimizerConfig, total_updates: int) -> Callable[[int], float]:
    """The learning rate of an update by its number from 1: a linear warm-up, then `optimizer.schedule`.

    The formulas are those of Megatron-Core's OptimizerParamScheduler, to the last bit.
    """
    highest, lowest, warmup = optimizer.lr, optimizer.lr * optimizer.min_lr_ratio, optimizer.warmup_steps
    end = max(optimizer.decay_updates or total_updates, warmup + 1)
    falling = min(optimizer.wsd_decay_updates or max(1, end // 10), end - warmup)

    def rate(update: int) -> float:
        if warmup and update <= warmup:
            return highest * float(update) / float(warmup)
        if optimizer.schedule == "constant":
            return highest
        if update > end:
            return lowest
        if optimizer.schedule == "wsd":
            share = shape_left(optimizer.wsd_decay_shape, max(0, update - (end - falling)) / falling)
        else:
            share = shape_left(optimizer.schedule, float(update - warmup) / float(end - warmup))
        return lowest + share * (highest - lowest)

    return rate


def shape_left(shape: str, done: float) -> float:
    """What is left of a fall from 1 to 0 of which the share `done` lies behind."""
    if shape == "cosine":
        return 0.5 * (math.cos(math.pi * done) + 1.0)
    if shape == "minus_sqrt":
        return 1.0 - math.sqrt(done)
    if shape == "exponential":
        return 2.0 * math.pow(0.5, done) - 1.0
    return 1.0 - done
