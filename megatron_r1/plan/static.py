"""What a rank holds however long sequences are: weights, gradients, optimizer, reference, reward models."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.conversion.model_shape import find_architecture
from megatron_r1.errors import R1Error
from megatron_r1.mcore.state_bytes import StateBytes
from megatron_r1.model.architecture import Architecture
from megatron_r1.plan.job import Job
from megatron_r1.plan.parameters import HeldParameters, gradient_ranks, held_parameters


@dataclass(frozen=True)
class RankState:
    """Bytes of one rank of a pipeline stage."""

    parameters: HeldParameters
    state: StateBytes
    reward_models: tuple[int, ...]  #: weights of each reward model that scores beside a policy


def rank_state(job: Job, stage: int) -> RankState:
    """What a rank of a pipeline stage holds in training, or, of a stage without optimizer, its weights alone."""
    held = held_parameters(
        job.arch, job.layout, stage, trains_mtp=job.trains_mtp, freeze_router=job.stage == "grpo" and job.section.freeze_router,
        trains=job.is_trained,
    )  # fmt: skip
    return RankState(held, _training_state(job, held), tuple(_scorer_weights(job, arch, stage) for arch in reward_models(job)))


def _training_state(job: Job, held: HeldParameters) -> StateBytes:
    dense_ranks, expert_ranks = gradient_ranks(job.layout)
    is_bf16 = job.runtime.dtype == "bf16"
    state = StateBytes.of(
        held.dense_buffer,
        held.expert_buffer,
        frozen=held.frozen,
        data_parallel=dense_ranks,
        expert_data_parallel=expert_ranks,
        bf16=is_bf16,
        has_reference=False,
        moments=job.switches.moments,
        on_host=job.switches.optimizer_on_host,
    )
    has_reference = job.stage == "grpo" and job.section.has_reference
    reference = job.width * held.all + held.buffer_bytes if has_reference else 0
    return StateBytes(
        weights=state.weights + held.buffer_bytes, gradients=state.gradients, optimizer=state.optimizer, reference=reference,
        update=state.update, host=state.host,
    )  # fmt: skip


def reward_models(job: Job) -> list[Architecture]:
    """The shapes of the reward models that score beside a policy; the policy's own under a head where a folder is not here."""
    if job.stage != "grpo" or job.config.reward.model != "reward_models":
        return []
    reward, found = job.config.reward, []
    for label, folder in (("helpful", reward.helpful_model), ("safety", reward.safety_model)):
        if folder is None:
            continue
        try:
            found.append(find_architecture(job.config.model.model_copy(update={"weights": folder, "overrides": {}})))
        except R1Error:  # a plan is made before the model is: stage 4's are trained from the policy's own base
            found.append(job.arch.as_reward_model(label))
    return found


def _scorer_weights(job: Job, arch: Architecture, stage: int) -> int:
    held = held_parameters(arch, job.layout, stage, trains=False)
    return job.width * held.all + held.buffer_bytes
