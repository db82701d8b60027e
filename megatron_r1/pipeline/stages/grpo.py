"""Reinforcement learning with GRPO."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_r1.algorithms.losses.registry import find_policy_loss
from megatron_r1.config.lengths import check_lengths, for_longest_response, lengths_after
from megatron_r1.config.resume import first_general_rollout
from megatron_r1.config.schema import Config
from megatron_r1.data.general import GeneralMix, load_general
from megatron_r1.data.problems import ProblemSource, load_problems
from megatron_r1.data.prompts import PromptStream, PromptWriter
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.builders.ends import with_end_of_turn
from megatron_r1.pipeline.builders.engines import build_engine_options, open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_policy, build_tokenizer
from megatron_r1.pipeline.builders.preferences import open_preferences
from megatron_r1.pipeline.builders.problems import fit_problems
from megatron_r1.pipeline.builders.rewards import build_evaluation, check_custom_rewards, open_rewards
from megatron_r1.pipeline.check_problems import check_references
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.common import (
    checkpoint_writer,
    finish_stage,
    require_setting,
    resume_run,
    unless_finished,
)
from megatron_r1.rewards.scorers import accuracy_scorers
from megatron_r1.runtime.distributed import is_rank_zero
from megatron_r1.runtime.run import Run
from megatron_r1.training.grpo import train_grpo
from megatron_r1.training.parity import describe_older_bound


def check_grpo(config: Config) -> None:
    """What can be said of the settings alone, before data are read and a model is built.

    Raises:
        ConfigError: settings that contradict each other, or a round whose responses would not fit into a forward pass.
    """
    stage = config.grpo
    outputs = stage.prompts_per_rollout * stage.group_size
    require_setting(
        outputs % stage.minibatch_size == 0,
        f"grpo.minibatch_size={stage.minibatch_size} does not divide the {outputs} outputs of a rollout",
    )
    require_setting(
        config.rollout.top_p == 1.0,
        "rollout.top_p must be 1 in training: the ratio is over the whole softmax, which top-p would cut",
    )
    check_lengths(config)
    find_policy_loss(stage.loss)


@unless_finished
def run_grpo(config: Config, session: Session) -> Artifact:
    """Train with GRPO from `model.weights`, or from random weights if that is not set."""
    stage, of_engine = config.grpo, for_longest_response(config)
    check_grpo(config)
    check_custom_rewards(config.reward)
    arch = build_architecture(config.model)
    tokenizer = build_tokenizer(config.data, config.model, arch)
    build_engine_options(of_engine, session.device.kind, arch, tokenizer)  # what an engine would refuse ends the run here
    writer = PromptWriter(config.data, tokenizer)
    source = fit_problems(_training_problems(config), writer)
    prompts = PromptStream(source, writer, config.seed)
    folder = Path(config.run_dir)
    with Run.open(folder, config, "grpo") as run, open_preferences(of_engine, session) as preferences:
        older = describe_older_bound(config.rollout)
        if older is not None and is_rank_zero():
            print(older, file=sys.stderr, flush=True)
        check_references(config, source, folder)
        policy = build_policy(
            config,
            session,
            arch,
            optimizer=stage.optimizer,
            moe=stage.moe,
            total_updates=stage.rollouts * stage.updates_per_rollout,
            micro_batch_tokens=stage.micro_batch_tokens,
            packed=True,
            temperature=config.rollout.temperature,
            freeze_router=stage.freeze_router,
            share_prompts=stage.share_prompts,
            exact_entropy=stage.exact_entropy,
        )
        policy.generation = with_end_of_turn(policy.generation, config.data, tokenizer)
        from megatron_r1.mcore.policy import ReferencePolicy

        reference = ReferencePolicy(policy, stage.reference_resident) if stage.has_reference else None
        state = resume_run(run, policy, reference)
        if state:
            prompts.load_state_dict(state["prompts"])
        policy.offload()  # the engine sizes itself by what is free
        with (
            open_rewards(config, session, source, folder / "scoring.log", writer.opening, preferences) as rewards,
            open_engine(of_engine, session, arch, tokenizer, folder / "engine.log") as engine,
        ):
            measure = build_evaluation(config, engine, rewards, source, writer)

            def evaluate(step: int) -> dict[str, float]:
                lengths = lengths_after(stage, config.rollout, policy.updates)
                return measure(step, stage.rollouts, lengths.max_response_tokens)

            train_grpo(
                stage,
                config.rollout,
                policy=policy,
                reference=reference,
                engine=engine,
                rewards=rewards,
                prompts=prompts,
                run=run,
                save=checkpoint_writer(policy, tokenizer, reference),
                evaluate=evaluate,
                seed=config.seed,
            )
        return finish_stage(config, "grpo", policy, tokenizer)


def _training_problems(config: Config) -> ProblemSource:
    """The problems of `data.source`; in the last updates with general prompts between them if `data.general_source` is set."""
    stage, reasoning, general = config.grpo, load_problems(config.data, accuracy_scorers(config.reward)), load_general(config.data)
    if general is None:
        return reasoning
    return GeneralMix(reasoning, general, first_general_rollout(stage) * stage.prompts_per_rollout, config.data.general_share)
