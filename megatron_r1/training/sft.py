"""Supervised fine-tuning on conversations."""

from __future__ import annotations

import math

import torch

from megatron_r1.config.sft import SftConfig
from megatron_r1.data.sft import SftData
from megatron_r1.runtime.exchange import gather_numbers
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Write
from megatron_r1.training.metrics import loss_metrics, update_metrics
from megatron_r1.training.pretrain import loss_over
from megatron_r1.training.protocols import Policy
from megatron_r1.types import TrainingSample


def count_sft_updates(stage: SftConfig, data: SftData) -> int:
    """Policy updates of all epochs; the last batch of an epoch may be smaller."""
    return stage.epochs * math.ceil(data.epoch_size / stage.batch_size)


def train_sft(stage: SftConfig, *, policy: Policy, data: SftData, run: Run, save: Write) -> None:
    """Go over the data `stage.epochs` times, going on where `run` left off: which samples a step trains on depends on its number.

    Args:
        data: samples with loss on the assistant's tokens only.
        save: writes the policy, as `Run.checkpoint` takes it.
    """
    per_epoch = math.ceil(data.epoch_size / stage.batch_size)
    total = stage.epochs * per_epoch
    validation = data.validation()
    if validation and run.resumed_from is None:
        run.record(0, {"validation/loss": validation_loss(policy, validation, stage.batch_size)})
    epoch, order = -1, []
    for step in run.steps(total, "SFT"):
        with run.timer("data"):
            if (step - 1) // per_epoch != epoch:
                epoch = (step - 1) // per_epoch
                order = data.epoch(epoch)
            start = (step - 1) % per_epoch * stage.batch_size
            batch = data.take(order[start : start + stage.batch_size])
        tokens, trained = sum(s.num_targets for s in batch), sum(s.num_trained for s in batch)
        with run.timer("train"):
            stats = policy.train_step(batch, loss_over(trained))
        run.count_tokens("train", tokens)
        run.count_flops(stats.flops)
        metrics = {
            **update_metrics(stats),
            "epoch": step / per_epoch,
            "tokens": tokens,
            "tokens/trained": trained,
            "tokens/packed_fraction": tokens / stats.tokens,
            "samples/dropped": data.dropped,
            **loss_metrics([stats], tokens=trained, samples=len(batch)),
        }
        if validation and (step == total or stage.validation_interval and step % stage.validation_interval == 0):
            with run.timer("validation"):
                metrics["validation/loss"] = validation_loss(policy, validation, stage.batch_size)
        run.record(step, metrics)
        if run.checkpoint_due(step, total):
            run.checkpoint(step, save, data.state_dict())


def validation_loss(policy: Policy, samples: list[TrainingSample], batch_size: int) -> float:
    """Mean negative log-likelihood of all trained tokens of the samples, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        for sample, logprobs in zip(batch, policy.logprobs(batch), strict=True):
            if logprobs is not None and policy.reports:
                total -= (logprobs.double() * torch.from_numpy(sample.loss_mask)).sum().item()
            count += sample.num_trained
    return gather_numbers([total])[:, 0].sum().item() / count
