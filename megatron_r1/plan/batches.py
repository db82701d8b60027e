"""How large the micro-batches of a stage are, and how many of them an update has, at most."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_r1.config.lengths import length_phases
from megatron_r1.data.sft import token_limit
from megatron_r1.mcore.layout import Layout, resolve_layout
from megatron_r1.plan.job import Job
from megatron_r1.training.pretrain_plan import PretrainPlan


@dataclass(frozen=True)
class Batch:
    """The micro-batches of a part of a stage."""

    name: str  #: of the part: "" if the stage is one
    tokens: int  #: of a micro-batch, over its context-parallel ranks
    micro_batches: int  #: of a data-parallel rank in an update
    layout: Layout  #: of this part
    setting: str  #: the key that makes micro-batches smaller
    longest: int  #: tokens of the longest sample, or of a row of a pretraining
    samples: int  #: of a data-parallel rank in an update


def batches(job: Job) -> list[Batch]:
    """Those of every part of a training stage: the phases of a pretraining, the limits of a schedule of lengths.

    Raises:
        ConfigError: a part's layout or batch does not divide.
    """
    return {"pretrain": _pretrain, "sft": _sft, "reward-model": _batches_of_reward_model, "grpo": _grpo}[job.stage](job)


def largest_batch(job: Job) -> Batch:
    """Of those, the one with the most tokens on a rank."""
    return max(batches(job), key=lambda batch: (batch.tokens // batch.layout.cp, batch.micro_batches))


def _pretrain(job: Job) -> list[Batch]:
    stage, found = job.config.pretrain, []
    for phase in PretrainPlan(stage).phases:
        layout = job.layout
        if phase.settings.cp is not None:
            parallel = job.config.parallel.model_copy(update={"cp": phase.settings.cp})
            stages = job.config.megatron.pipeline_model_parallel_layout
            layout = resolve_layout(parallel, job.arch, job.world_size, mtp=job.trains_mtp, stages=stages)
        rows = max(level.rows for level in phase.levels)
        count = -(-rows // (phase.micro_batch_size * layout.dp))
        smaller = "pretrain.micro_batch_size" if phase.micro_batch_size > 1 else "parallel.cp"
        name = f"phase {phase.number}" if stage.phases else ""
        tokens, samples = phase.micro_batch_size * phase.sequence_length, -(-rows // layout.dp)
        found.append(Batch(name, tokens, count, layout, smaller, phase.sequence_length, samples))
    return found


def _sft(job: Job) -> list[Batch]:
    stage = job.config.sft
    limit = token_limit(stage)
    return [_packed_batch(job, stage.micro_batch_tokens, limit, stage.batch_size, "sft.micro_batch_tokens")]


def _batches_of_reward_model(job: Job) -> list[Batch]:
    stage = job.config.reward_model
    longest = min(stage.micro_batch_tokens, (2 if stage.kind == "helpful" else 1) * stage.max_tokens)
    return [_packed_batch(job, stage.micro_batch_tokens, longest, stage.batch_size, "reward_model.micro_batch_tokens")]


def _grpo(job: Job) -> list[Batch]:
    stage, prompt = job.config.grpo, job.config.data.max_prompt_tokens
    phases = length_phases(stage, job.config.rollout)
    found = []
    for phase in phases:
        longest = prompt + phase.max_response_tokens - 1
        batch = _packed_batch(job, phase.micro_batch_tokens, longest, stage.minibatch_size, phase.micro_batch_key)
        found.append(replace(batch, name=f"from update {phase.after_updates:,}" if len(phases) > 1 else ""))
    return found


def _packed_batch(job: Job, tokens: int, longest: int, samples: int, setting: str) -> Batch:
    """With samples at their limit, which need the most micro-batches."""
    of_rank = -(-samples // job.layout.dp)
    return Batch("", tokens, -(-of_rank // max(1, tokens // longest)), job.layout, setting, longest, of_rank)
