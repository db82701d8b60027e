"""Training a reward model (DeepSeek-R1, arXiv 2501.12948v2, section 3.1): pairs of responses, or responses labelled safe or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from megatron_r1.algorithms.losses.contract import Metrics
from megatron_r1.algorithms.losses.registry import REWARD_MODEL_LOSSES
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.data.reward_packing import ScoredExample, last_token_values
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Write
from megatron_r1.training.metrics import loss_metrics, update_metrics
from megatron_r1.training.protocols import LossFn, Stats
from megatron_r1.training.samples import minibatches
from megatron_r1.types import PADDING, MicroBatch


class RewardModel(Protocol):
    """r_phi. All ranks call its methods together."""

    def train_step(self, examples: list[ScoredExample], loss_fn: LossFn) -> Stats:
        """One update on a whole batch."""

    def scores(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[float]:
        """The score at the last token of each sequence; all ranks pass the same."""

    def own_scores(self, sequences: Sequence[np.ndarray]) -> list[float]:
        """The same of the sequences [T] int32 of this rank, whatever the others pass."""


def count_reward_updates(stage: RewardModelConfig, num_examples: int) -> int:
    """Updates of all epochs; the last batch of an epoch may be smaller."""
    return stage.epochs * math.ceil(num_examples / stage.batch_size)


def train_reward_model(
    stage: RewardModelConfig,
    *,
    model: RewardModel,
    examples: list[ScoredExample],
    heldout: list[ScoredExample],
    run: Run,
    save: Write,
    seed: int,
) -> None:
    """Go over the examples `stage.epochs` times in an order that depends on seed and epoch only, from where `run` left off.

    Args:
        heldout: measured every `stage.validate_interval` updates and at the end; may be empty.
        save: writes the model, as `Run.checkpoint` takes it.
    """
    total = count_reward_updates(stage, len(examples))
    per_epoch = total // stage.epochs
    epoch, batches = -1, []
    for step in run.steps(total, "reward model"):
        if (step - 1) // per_epoch != epoch:
            epoch = (step - 1) // per_epoch
            batches = list(minibatches(examples, stage.batch_size, f"{seed}/{epoch}"))
        batch = batches[(step - 1) % per_epoch]
        with run.timer("train"):
            stats = model.train_step(batch, reward_loss_of(stage.kind, batch))
        run.count_tokens("train", sum(example.num_tokens for example in batch))
        run.count_flops(stats.flops)
        metrics = update_metrics(stats) | {"epoch": step / per_epoch}
        metrics |= loss_metrics([stats], tokens=stats.tokens, samples=len(batch))
        if heldout and (step == total or (stage.validate_interval and step % stage.validate_interval == 0)):
            with run.timer("validate"):
                metrics |= {f"validation/{name}": value for name, value in measure_reward_model(stage.kind, model, heldout).items()}
        run.record(step, metrics)
        if run.checkpoint_due(step, total):
            run.checkpoint(step, save, {})


def reward_loss_of(kind: str, examples: list[ScoredExample]) -> LossFn:
    """The loss over a batch, given the score of every token of its micro-batches."""

    def compute(scores_1N: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        numbers = [number for number in micro_batch.sample_ids if number != PADDING]
        return _loss_of_scores(kind, last_token_values(micro_batch, scores_1N), numbers, examples)

    return compute


def measure_reward_model(kind: str, model: RewardModel, examples: list[ScoredExample]) -> dict[str, float]:
    """Loss, accuracy and, of pairs, margin: means over the examples."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    loss, metrics = _loss_of_scores(kind, torch.tensor(model.scores(sequences)), list(range(len(sequences))), examples)
    return {"loss": loss.item()} | {name: metric.value.item() / len(examples) for name, metric in metrics.items()}


def _loss_of_scores(
    kind: str, scores_S: torch.Tensor, numbers: list[int], examples: list[ScoredExample]
) -> tuple[torch.Tensor, Metrics]:
    """The loss of some of the batch's sequences, `numbers` in order; the two of a pair are neighbours, the chosen one first."""
    safe = [float(bool(examples[number].safe)) for number in numbers] if kind == "safety" else []
    return REWARD_MODEL_LOSSES[kind](scores_S, torch.tensor(safe, device=scores_S.device), denominator=len(examples))
