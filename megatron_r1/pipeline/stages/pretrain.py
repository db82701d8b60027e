"""Pretraining of a base model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.config.data import BlendSource
from megatron_r1.config.schema import Config
from megatron_r1.data.prompts import PromptWriter, force_thinking, heldout_prompts
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.heldout import scores
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import describe_errors
from megatron_r1.model.rope import read_rope
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_policy, build_tokenizer, resolve_policy_layout
from megatron_r1.pipeline.builders.pretrain_rows import PretrainData, ahead_of_training, blend_indices
from megatron_r1.pipeline.builders.problems import build_problems
from megatron_r1.pipeline.builders.rewards import check_custom_rewards, open_rewards
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.common import checkpoint_writer, finish_stage, require_setting, resume_run, unless_finished
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.run import Run
from megatron_r1.training.pretrain import count_steps, own_rows, train_base
from megatron_r1.training.pretrain_plan import Phase, PretrainPlan
from megatron_r1.training.protocols import Rewards
from megatron_r1.training.validation import Validation
from megatron_r1.types import Prompt, Sampling

if TYPE_CHECKING:
    from megatron_r1.mcore.policy import MegatronPolicy


_MOST_SOURCES = 32_766  # BlendedDataset numbers them in 16 bits
_LEAST_SHARE = 1e-15  # a row of V3's 14.8T tokens has a larger one


def check_pretrain(config: Config) -> PretrainPlan:
    """What can be said of the settings alone. Raises ConfigError if they contradict each other."""
    if config.pretrain.validation.interval:
        require_setting(
            bool(config.data.blend) and config.data.split[1] > 0,
            "pretrain.validation.interval needs documents to validate with: set data.blend and data.split, such as [99, 1]",
        )
    _check_blend("data.blend", config.data.blend)
    for number, phase in enumerate(config.pretrain.phases):
        require_setting(
            bool(config.data.blend) or not phase.blend,
            f"pretrain.phases.{number}.blend is set and data.blend is not: name in data.blend what the other phases train on",
        )
        _check_blend(f"pretrain.phases.{number}.blend", phase.blend)
    return PretrainPlan(config.pretrain)


def _check_blend(key: str, blend: Sequence[BlendSource]) -> None:
    """Raises ConfigError for sources of which Megatron-Core makes no blend, or whose rows would come twice."""
    require_setting(len(blend) <= _MOST_SOURCES, f"{key} has {len(blend):,} sources; {_MOST_SOURCES:,} is the most")
    named: dict[str, str] = {}
    for source in blend:
        real = os.path.realpath(source.path)
        same = f"and {named.get(real)}, which is the same" if named.get(real) != source.path else "twice"
        require_setting(
            real not in named, f"{key} names {source.path} {same}: its rows would come twice; name it once, with the whole weight"
        )
        named[real] = source.path
    total = sum(source.weight for source in blend)
    for source in blend:
        require_setting(
            total < math.inf and source.weight / total >= _LEAST_SHARE,
            f"{key}: weight={source.weight} of {source.path} is too small a share of {total}, or all are too large together",
        )


def check_phase(config: Config, phase: Phase, arch: Architecture, layout: Layout) -> list[int]:
    """Whether a phase fits the model and its layout.

    Args:
        arch: of the phase, see `phase_architecture`.
        layout: of the phase.

    Returns:
        Micro-batches of a data-parallel rank in one update of each level of the batch.

    Raises:
        ConfigError: it does not; one line that names the setting.
    """
    named = check_length(phase, arch)
    _check_rows(named, phase, layout, config.pretrain.mask_documents)
    return [_count_micro_batches(phase, level.rows, layout) for level in phase.levels]


def check_length(phase: Phase, arch: Architecture) -> str:
    """Whether the model has the positions of a phase. Args: `arch`: of the phase. Returns how the length is set.

    Raises:
        ConfigError: it has not, or its RoPE does not reach.
    """
    length, limit = phase.sequence_length, arch.max_position_embeddings
    named = f"{phase.key if phase.settings.sequence_length else 'pretrain'}.sequence_length={length}"
    require_setting(length <= limit, f"{named} is more than the model's {limit} positions (max_position_embeddings)")
    scaling = getattr(arch, "rope_scaling", None)
    if phase.settings.rope_scaling is not None and scaling is not None:
        reach = int(scaling.factor * scaling.original_max_position_embeddings)
        require_setting(length <= reach, f"{named} is more than the {reach} tokens that {phase.key}.rope_scaling reaches")
    return named


def _check_rows(named: str, phase: Phase, layout: Layout, masked: bool) -> None:
    """Raises ConfigError if the ranks that share a row of tokens cannot have equal parts of it."""
    require_setting(
        layout.cp == 1 or not masked,
        f"{phase.key}: context parallelism over {layout.cp} ranks cuts every document into {2 * layout.cp} equal parts, and "
        "pretrain.mask_documents takes documents of any length: set it to false, or cp to 1",
    )
    tokens = phase.sequence_length * (phase.micro_batch_size if masked else 1)  # masked, a micro-batch is one row
    multiple = math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.cp * layout.tp if layout.sequence_parallel else 1)
    require_setting(
        tokens % multiple == 0,
        f"{named} makes rows of {tokens} tokens, no multiple of {multiple}, which "
        f"parallel.tp={layout.tp} and parallel.cp={layout.cp} need to share them",
    )


def _count_micro_batches(phase: Phase, rows: int, layout: Layout) -> int:
    """Micro-batches of a data-parallel rank in one update. Raises ConfigError if the layout does not divide the batch."""
    micro_batches = rows // phase.micro_batch_size
    of_batch = "" if phase.key == "pretrain" else f"{rows} sequences, "
    way_on = "lower pretrain.micro_batch_size"
    if phase.micro_batch_size == 1:
        way_on = f"raise {phase.key}.cp, or take a batch that divides" if of_batch else "raise pretrain.global_batch_size"
    require_setting(
        micro_batches % (layout.dp * layout.count_multiple) == 0,
        f"{phase.key}: {of_batch}{micro_batches} micro-batches do not divide over {layout.dp} "
        f"data-parallel ranks{' in an interleaved pipeline' if layout.vpp > 1 else ''}; {way_on}",
    )
    return micro_batches // layout.dp


def phase_config(config: Config, phase: Phase) -> Config:
    """The settings with the layout of a phase."""
    if phase.settings.cp is None:
        return config
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"cp": phase.settings.cp})})


def phase_architecture(arch: Architecture, phase: Phase) -> Architecture:
    """The model's shape with the RoPE of a phase. Raises ConfigError for a scaling that its family does not have."""
    given = phase.rope_scaling
    if isinstance(given, str):
        return arch
    try:
        base, kind, numbers = read_rope({"rope_scaling": given, "max_position_embeddings": arch.max_position_embeddings})
        if base not in (None, arch.rope_theta):
            raise ValueError(f"rope_theta is {base} and the model's {arch.rope_theta}: drop it")
        scaling = None if kind == "default" else type(arch).read_rope_scaling(kind, numbers)
        return type(arch)(**{**arch.model_dump(), "rope_scaling": scaling})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{phase.key}.rope_scaling: {describe_errors(error)}") from None


def phase_layout(config: Config, arch: Architecture, phase: Phase, world_size: int) -> Layout:
    """The layout of a phase on so many ranks. Raises ConfigError, see `resolve_policy_layout`."""
    stage = config.pretrain
    return resolve_policy_layout(phase_config(config, phase), arch, world_size, moe=stage.moe)


@unless_finished
def run_pretrain(config: Config, session: Session) -> Artifact:
    """Pretrain a base model: all its phases and, if it has a gate, until the gate is passed.

    A phase begins as a run that goes on does, from the checkpoint at the end of the one before it: with the same weights and
    optimizer, and a model of another RoPE, perhaps on another layout.
    """
    plan = check_pretrain(config)
    check_custom_rewards(config.reward)
    arch = build_architecture(config.model)
    for phase in plan.phases:
        shape = phase_architecture(arch, phase)
        check_phase(config, phase, shape, phase_layout(config, shape, phase, session.launch.world_size))
    tokenizer = build_tokenizer(config.data, config.model, arch)
    data = PretrainData(config, tokenizer, plan)
    checkpoint = config.checkpoint.model_copy(update={"interval": config.pretrain.checkpoint_interval})
    with Run.open(Path(config.run_dir), config.model_copy(update={"checkpoint": checkpoint}), "pretrain") as run:
        for phase in plan.phases[plan.phase_of(run.step + 1).number :]:
            shape = phase_architecture(arch, phase)
            policy = _train_phase(phase_config(config, phase), session, shape, plan, phase, data, tokenizer, run)
            if phase is not plan.phases[-1]:
                del policy  # its memory is free before the next one is built
                session.device.release_memory()
                run.go_on()
        return finish_stage(config, "pretrain", policy, tokenizer, blend_indices(config))


def _train_phase(
    config: Config,
    session: Session,
    arch: Architecture,
    plan: PretrainPlan,
    phase: Phase,
    data: PretrainData,
    tokenizer: Tokenizer,
    run: Run,
) -> MegatronPolicy:
    """The policy at the end of a phase, begun from the checkpoint that `run` goes on from."""
    stage, is_last = config.pretrain, phase is plan.phases[-1]
    policy = build_policy(
        config,
        session,
        arch,
        optimizer=stage.optimizer,
        moe=plan.moe,
        total_updates=plan.total_updates,
        micro_batch_tokens=phase.micro_batch_size * phase.sequence_length,
        packed=stage.mask_documents,
        ema_decay=stage.ema_decay,
        rates=lambda number: plan.update(number).rates,
    )
    from megatron_r1.mcore import parallel

    place = parallel.find_share()
    data_parallel = (place.number, place.count)
    rows, held_out = data.of_phase(phase, reads=place.is_first or place.is_last)
    validate = Validation(
        policy,
        held_out,
        len(plan.update(phase.last_update).rows),
        phase.micro_batch_size,
        *data_parallel,
        policy.layout.count_multiple,
    )
    state = resume_run(run, policy)
    if state:
        consumed = plan.update(run.step + 1).first_token
        rows.load_state_dict({"token": consumed} | state["documents"])  # earlier versions took the rows of all ranks on each

    def train(gate: Callable[[], float] | None) -> None:
        last = count_steps(stage, phase.last_update, gated=gate is not None)[-1]
        coming = (plan.update(number).rows for number in range(run.step + 1, last + 1))
        own = (own_rows(update, phase.micro_batch_size, *data_parallel) for update in coming)
        with ahead_of_training(rows, own, config.data.read_ahead) as rows_ahead:
            train_base(
                stage,
                plan=plan,
                phase=phase,
                policy=policy,
                rows=rows_ahead,
                run=run,
                save=checkpoint_writer(policy, tokenizer),
                gate=gate,
                data_parallel=data_parallel,
                validate=validate if held_out else None,
            )

    if not stage.gate_accuracy or not is_last:
        train(None)
    elif not state or not state["gate_passed"] or run.step < plan.total_updates:
        folder, writer = Path(config.run_dir), PromptWriter(config.data, tokenizer)
        problems = build_problems(config, writer)
        policy.offload()
        with (
            open_rewards(config, session, problems, folder / "scoring.log", writer.opening) as rewards,
            open_engine(config, session, arch, tokenizer, folder / "engine.log") as engine,
        ):
            engine.sleep()  # it started awake, and is asked at the end
            asked = heldout_prompts(problems, writer, stage.gate_problems, config.evaluate.seed)
            train(_build_gate(config, engine, rewards, policy, [force_thinking(prompt, tokenizer) for prompt in asked]))
    return policy


def _build_gate(
    config: Config, engine: RolloutEngine, rewards: Rewards, policy: MegatronPolicy, prompts: Sequence[Prompt]
) -> Callable[[], float]:
    """A function that measures greedy accuracy on prompts of held-out problems that open the thinking.

    So it measures what the base can do, apart from its habit of thinking or not.
    """

    def measure() -> float:
        policy.offload()
        engine.load_weights(policy.shards(), version=policy.updates)
        own = engine.generate(prompts, Sampling(1, 0.0, 1.0, config.rollout.max_response_tokens), seed=0, on_group=rewards.submit)
        engine.sleep()
        groups = rewards.collect(own, prompts)
        return sum(scores(group, "accuracy")[0] for group in groups) / len(groups)

    return measure
