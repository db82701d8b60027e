"""Pretraining of a base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.config.pretrain import PretrainConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.documents import DocumentStream, load_documents
from megatron_r1.data.prompts import PromptWriter, force_thinking, heldout_prompts
from megatron_r1.evaluation.heldout import scores
from megatron_r1.mcore.layout import Layout
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.builders.engines import open_engine
from megatron_r1.pipeline.builders.models import build_architecture, build_policy, build_tokenizer
from megatron_r1.pipeline.builders.problems import build_problems
from megatron_r1.pipeline.builders.rewards import check_custom_rewards, open_rewards
from megatron_r1.pipeline.session import Session
from megatron_r1.pipeline.stages.common import checkpoint_writer, finish_stage, require_setting, resume_run, unless_finished
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.run import Run
from megatron_r1.training.pretrain import train_base
from megatron_r1.training.protocols import Rewards
from megatron_r1.types import Prompt, Sampling

if TYPE_CHECKING:
    from megatron_r1.mcore.policy import MegatronPolicy


def check_pretrain(config: Config) -> None:
    """What can be said of the settings alone. Raises ConfigError if they contradict each other."""
    stage = config.pretrain
    require_setting(
        stage.global_batch_size % stage.micro_batch_size == 0,
        "pretrain.micro_batch_size does not divide pretrain.global_batch_size",
    )


def check_sequences(stage: PretrainConfig, layout: Layout) -> None:
    """Raises ConfigError if the ranks that share a row of tokens cannot have equal parts of it."""
    tokens = stage.sequence_length * (stage.micro_batch_size if stage.mask_documents else 1)  # masked, a micro-batch is one row
    multiple = math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.cp * layout.tp if layout.sequence_parallel else 1)
    require_setting(
        tokens % multiple == 0,
        f"pretrain.sequence_length={stage.sequence_length} makes rows of {tokens} tokens, no multiple of {multiple}, which "
        f"parallel.tp={layout.tp} and parallel.cp={layout.cp} need to share them",
    )


def count_micro_batches(stage: PretrainConfig, layout: Layout) -> int:
    """Micro-batches of a data-parallel rank in one update. Raises ConfigError if the layout does not divide the batch."""
    micro_batches = stage.global_batch_size // stage.micro_batch_size
    require_setting(
        micro_batches % (layout.dp * layout.count_multiple) == 0,
        f"pretrain: {micro_batches} micro-batches do not divide over {layout.dp} "
        f"data-parallel ranks{' in an interleaved pipeline' if layout.vpp > 1 else ''}; lower pretrain.micro_batch_size",
    )
    return micro_batches // layout.dp


@unless_finished
def run_pretrain(config: Config, session: Session) -> Artifact:
    """Pretrain a base model: all its steps and, if it has a gate, until the gate is passed."""
    stage = config.pretrain
    check_pretrain(config)
    check_custom_rewards(config.reward)
    arch = build_architecture(config.model)
    tokenizer = build_tokenizer(config.data, config.model, arch)
    rows = DocumentStream(load_documents(config.data), tokenizer, config.seed, stage.mask_documents, stage.sequence_length)
    checkpoint = config.checkpoint.model_copy(update={"interval": stage.checkpoint_interval})
    with Run.open(Path(config.run_dir), config.model_copy(update={"checkpoint": checkpoint}), "pretrain") as run:
        policy = build_policy(
            config,
            session,
            arch,
            optimizer=stage.optimizer,
            moe=stage.moe,
            total_updates=stage.steps,
            micro_batch_tokens=stage.micro_batch_size * stage.sequence_length,
            packed=stage.mask_documents,
        )
        from megatron_r1.mcore import parallel

        data_parallel = (parallel.data_parallel_rank(), policy.layout.dp)
        check_sequences(stage, policy.layout)
        count_micro_batches(stage, policy.layout)
        state = resume_run(run, policy)
        if state:
            consumed = run.step * stage.global_batch_size * stage.sequence_length
            rows.load_state_dict({"token": consumed} | state["documents"])  # earlier versions took the rows of all ranks on each

        def train(gate: Callable[[], float] | None) -> None:
            train_base(
                stage,
                policy=policy,
                rows=rows,
                run=run,
                save=checkpoint_writer(policy, tokenizer),
                gate=gate,
                data_parallel=data_parallel,
            )

        if not stage.gate_accuracy:
            train(None)
        elif not state or not state["gate_passed"] or run.step < stage.steps:
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
        return finish_stage(config, "pretrain", policy, tokenizer)


def _build_gate(
    config: Config, engine: RolloutEngine, rewards: Rewards, policy: MegatronPolicy, prompts: Sequence[Prompt]
) -> Callable[[], float]:
    """A function that measures greedy accuracy on prompts of held-out problems that open the thinking.

    So it measures what the base can do, apart from its habit of thinking or not.
    """

    def measure() -> float:
        policy.offload()
        engine.load_weights(policy.weights(), version=policy.updates)
        own = engine.generate(prompts, Sampling(1, 0.0, 1.0, config.rollout.max_response_tokens), seed=0, on_group=rewards.submit)
        engine.sleep()
        groups = rewards.collect(own, prompts)
        return sum(scores(group, "accuracy")[0] for group in groups) / len(groups)

    return measure
