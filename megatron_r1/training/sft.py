"""Supervised fine-tuning on prompt/response pairs."""

from __future__ import annotations

import math

from megatron_r1.config.schema import SftConfig
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Write
from megatron_r1.training.pretrain import loss_over
from megatron_r1.training.protocols import Policy
from megatron_r1.training.samples import minibatches
from megatron_r1.types import TrainingSample


def count_updates(stage: SftConfig, num_examples: int) -> int:
    """Policy updates of all epochs; the last minibatch of an epoch may be smaller."""
    return stage.epochs * math.ceil(num_examples / stage.batch_size)


def train_sft(stage: SftConfig, *, policy: Policy, samples: list[TrainingSample], run: Run, save: Write, seed: int) -> None:
    """Go over the samples `stage.epochs` times in an order that depends on seed and epoch only, going on where `run` left off.

    Args:
        samples: loss on the response tokens only.
        save: writes the policy, as `Run.checkpoint` wants it.
    """
    per_epoch = math.ceil(len(samples) / stage.batch_size)
    total = stage.epochs * per_epoch
    epoch, batches = -1, []
    for step in run.steps(total, "SFT"):
        if (step - 1) // per_epoch != epoch:
            epoch = (step - 1) // per_epoch
            batches = list(minibatches(samples, stage.batch_size, f"{seed}/{epoch}"))
        batch = batches[(step - 1) % per_epoch]
        with run.timer("train"):
            stats = policy.train_step(batch, loss_over(sum(s.num_trained for s in batch)))
        run.count_tokens("train", sum(s.num_targets for s in batch))
        run.record(step, {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, "epoch": step / per_epoch})
        if run.checkpoint_due(step, total):
            run.checkpoint(step, save, {})
