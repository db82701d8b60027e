"""Next-token pretraining of a base model (DeepSeek-V3, arXiv 2412.19437, section 4.2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from megatron_r1.algorithms.losses.contract import Metrics
from megatron_r1.algorithms.losses.sft import cross_entropy_loss
from megatron_r1.config.pretrain import PretrainConfig
from megatron_r1.errors import R1Error
from megatron_r1.runtime.distributed import is_rank_zero
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Write
from megatron_r1.training.metrics import loss_metrics, update_metrics
from megatron_r1.training.pretrain_plan import Phase, PretrainPlan
from megatron_r1.training.protocols import LossFn, PretrainRows, Stats
from megatron_r1.types import MicroBatch


class Trainable(Protocol):
    """The policy, seen by pretraining."""

    def train_on_micro_batches(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, name_of: Callable[[MicroBatch, int, int], str]
    ) -> Stats:
        """One update on this rank's micro-batches. `name_of` names what is at a row and a position of one."""


class GateNotReached(R1Error):
    """The base did not learn what the next stage needs."""

    exit_code = 1


def train_base(
    stage: PretrainConfig,
    *,
    plan: PretrainPlan,
    phase: Phase,
    policy: Trainable,
    rows: PretrainRows,
    run: Run,
    save: Write,
    gate: Callable[[], float] | None,
    data_parallel: tuple[int, int],
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Train to the end of a phase and then, if it is the last one and there is a gate, in its last batch until the gate is passed.

    Args:
        policy: takes the rates of its updates from the plan.
        rows: of the phase.
        save: writes the policy, as `Run.checkpoint` takes it.
        gate: measures the accuracy that `stage.gate_accuracy` asks for; None in all phases but the last.
        data_parallel: this rank's index and the number of data-parallel ranks.
        validate: measures what is logged every `stage.validation.interval` updates, and after the last.

    Raises:
        GateNotReached: still below the gate after `stage.gate_max_extra` rounds of `stage.gate_extra_steps`.
    """
    totals = count_steps(stage, phase.last_update, gated=gate is not None)
    for total in [total for total in totals if total >= run.step] or totals[-1:]:
        for step in run.steps(total, "pretraining", end=plan.total_updates):
            update = plan.update(step)
            with run.timer("data"):
                own = own_rows(update.rows, phase.micro_batch_size, *data_parallel)
                micro_batches = [rows.micro_batch(numbers) for numbers in own]
            with run.timer("train"):
                stats = policy.train_on_micro_batches(micro_batches, loss_over(update.tokens), rows.name_of)
            if not stats.applied and is_rank_zero():
                print(f"megatron-r1 show-samples {run.folder} {step}  # what was left out", file=sys.stderr, flush=True)
            run.count_tokens("train", update.tokens)
            run.count_flops(stats.flops)
            metrics = update_metrics(stats) | loss_metrics([stats], tokens=update.tokens, samples=len(update.rows))
            if stage.phases:
                metrics |= {"phase": phase.number, "consumed_tokens": update.first_token + update.tokens}
            if validate is not None and (step == total or step % stage.validation.interval == 0):
                with run.timer("validation"):
                    metrics |= validate()
            if gate and step == total:
                metrics["gate/accuracy"] = gate()
            passed = metrics.get("gate/accuracy", -1.0) >= stage.gate_accuracy
            run.record(step, metrics)
            if run.checkpoint_due(step, total):
                state = {"documents": rows.state_dict(), "gate_passed": passed, "phase": phase.number}
                run.checkpoint(step, save, state)
            if passed:
                return
    if gate:
        raise GateNotReached(
            f"the base is below pretrain.gate_accuracy={stage.gate_accuracy} after {total} steps (gate/accuracy in metrics.jsonl): "
            "reinforcement learning would not take off; raise pretrain.steps or try another seed"
        )


def count_rows(stage: PretrainConfig, plan: PretrainPlan, phase: Phase) -> int:
    """Rows that a phase needs at most, extra rounds of the gate included."""
    last = count_steps(stage, phase.last_update, gated=stage.gate_accuracy > 0 and phase is plan.phases[-1])[-1]
    return plan.update(last).rows.stop


def own_rows(update: range, micro_batch_size: int, rank: int, size: int) -> list[range]:
    """The micro-batches of one of `size` data-parallel ranks: ranks take them in turn, from the rows of one update."""
    starts = range(rank * micro_batch_size, len(update), size * micro_batch_size)
    return [update[start : start + micro_batch_size] for start in starts]


def count_steps(stage: PretrainConfig, end: int, gated: bool) -> list[int]:
    """The steps after which the gate is measured: at the end, then after every extra round."""
    rounds = stage.gate_max_extra if gated and stage.gate_extra_steps else 0
    return [end + i * stage.gate_extra_steps for i in range(rounds + 1)]


def loss_over(num_targets: int) -> LossFn:
    """Mean negative log-likelihood over a batch of `num_targets` trained tokens."""

    def compute(logprobs: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        return cross_entropy_loss(logprobs, loss_mask=micro_batch.loss_mask, denominator=num_targets), {}

    return compute
