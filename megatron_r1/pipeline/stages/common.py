"""One training stage each: build what it needs, resume or start, train, export the model.

Every stage writes `<run_dir>/hf`, a sealed artifact; a stage whose artifact is there is not run again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.config.schema import Config
from megatron_r1.data.chat.template import r1_chat_jinja
from megatron_r1.data.documents import DocumentStream, load_documents
from megatron_r1.data.general import GeneralMix, load_general
from megatron_r1.data.preferences import READERS, split_heldout
from megatron_r1.data.problems import ProblemSource, load_problems
from megatron_r1.data.prompts import PromptStream, force_thinking, heldout_prompts
from megatron_r1.data.sft import PREVIEW, SftData, prepare_sft
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.evaluate import scores
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.pipeline.builders.models import (
    build_architecture,
    build_evaluation,
    build_policy,
    build_reward_model,
    build_tokenizer,
    describe_policy,
    export_policy,
    find_architecture,
    open_engine,
    open_rewards,
)
from megatron_r1.pipeline.builders.preferences import encode_examples, open_preferences
from megatron_r1.pipeline.session import Session
from megatron_r1.report.html import write_report
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.distributed import broadcast_object, failing_together, on_rank_zero
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Unwritten, Write
from megatron_r1.training.grpo import train_grpo
from megatron_r1.training.pretrain import pretrain
from megatron_r1.training.protocols import Rewards
from megatron_r1.training.reward_model import count_updates as count_reward_updates
from megatron_r1.training.reward_model import train_reward_model
from megatron_r1.training.sft import count_updates, train_sft
from megatron_r1.types import Sampling

if TYPE_CHECKING:
    from megatron_r1.mcore.megatron_model import MegatronModel
    from megatron_r1.mcore.policy import MegatronPolicy, ReferencePolicy


def run_pretrain(config: Config, session: Session) -> Artifact:
    """Pretrain a base model until its steps, and its gate where it has one, are done."""
    stage = config.pretrain
    artifact = Artifact(Path(config.run_dir) / "hf")
    if _is_done(artifact):
        return artifact
    _require(
        stage.global_batch_size % stage.micro_batch_size == 0,
        "pretrain.micro_batch_size does not divide pretrain.global_batch_size",
    )
    arch = build_architecture(config)
    tokenizer = build_tokenizer(config, arch)
    documents = DocumentStream(load_documents(config.data), tokenizer, config.seed, stage.mask_documents)
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
        divisor = policy.layout.dp * (policy.layout.pp if policy.layout.vpp > 1 else 1)
        _require(
            stage.global_batch_size // stage.micro_batch_size % divisor == 0,
            f"pretrain: {stage.global_batch_size // stage.micro_batch_size} micro-batches do not divide over {policy.layout.dp} data-parallel "
            f"ranks{' in an interleaved pipeline' if policy.layout.vpp > 1 else ''}; lower pretrain.micro_batch_size",
        )
        state = _resume(run, policy)
        if state:
            documents.load_state_dict(state["documents"])

        def train(gate: Callable[[], float] | None) -> None:
            pretrain(
                stage,
                policy=policy,
                documents=documents,
                run=run,
                save=_saver(policy, tokenizer),
                gate=gate,
                data_parallel=data_parallel,
            )

        if not stage.gate_accuracy:
            train(None)
        elif not state or not state["gate_passed"]:
            folder, problems = Path(config.run_dir), load_problems(config.data)
            with (
                open_rewards(config, problems, folder / "scoring.log") as rewards,
                open_engine(config, session, arch, tokenizer, folder / "engine.log") as engine,
            ):
                train(_build_gate(config, engine, rewards, policy, problems, tokenizer))
        return _finish(config, "pretrain", policy, tokenizer, artifact)


def run_sft(config: Config, session: Session) -> Artifact:
    """Fine-tune on the conversations of `sft.sources`, else of `data.source`."""
    stage, folder = config.sft, Path(config.run_dir)
    artifact = Artifact(folder / "hf")
    if _is_done(artifact):
        return artifact
    _require_no_context_parallel(config)
    _require(
        config.data.tokenizer is not None or config.model.weights is not None,
        "sft needs a tokenizer: set data.tokenizer, or model.weights to a folder that has one",
    )
    arch = build_architecture(config)
    tokenizer = build_tokenizer(config, arch)
    with Run.open(folder, config, "sft") as run:
        on_rank_zero(lambda: prepare_sft(stage, config.data, tokenizer, folder / "data", _tell_tokenised))
        with failing_together():
            data = SftData(folder / "data", stage, config.seed)
            data.check_same(run.state)
        on_rank_zero(lambda: print(f"sft: {data.describe()}; see {folder / 'data' / PREVIEW}", flush=True))
        policy = build_policy(
            config,
            session,
            arch,
            optimizer=stage.optimizer,
            moe=stage.moe,
            total_updates=count_updates(stage, data),
            micro_batch_tokens=stage.micro_batch_tokens,
            packed=True,
        )
        _resume(run, policy)
        if config.data.template in ("r1_chat", "r1_chat_think"):  # so that servers render what the model was trained on
            tokenizer = tokenizer.with_chat_template(r1_chat_jinja(opened=config.data.template == "r1_chat_think"))
        train_sft(stage, policy=policy, data=data, run=run, save=_saver(policy, tokenizer))
        return _finish(config, "sft", policy, tokenizer, artifact)


def run_reward_model(config: Config, session: Session) -> Artifact:
    """Train a reward model on the pairs or the labelled responses of `data.source`."""
    stage = config.reward_model
    artifact = Artifact(Path(config.run_dir) / "hf")
    if _is_done(artifact):
        return artifact
    _require_no_context_parallel(config)
    _require(config.data.template == "r1_chat", "data.template must be r1_chat: a reward model reads whole conversations")
    examples, heldout = split_heldout(READERS[stage.kind](Path(config.data.source)), config.data.heldout_fraction)
    _require(bool(examples), f"data.heldout_fraction={config.data.heldout_fraction} leaves no example to train on")
    tokenizer = build_tokenizer(config, find_architecture(config))
    examples, heldout = (encode_examples(part, stage, tokenizer) for part in (examples, heldout))
    with Run.open(Path(config.run_dir), config, "reward-model") as run:
        model = build_reward_model(
            config, session, label=stage.kind, optimizer=stage.optimizer, total_updates=count_reward_updates(stage, len(examples))
        )
        _resume(run, model)
        save = _saver(model, tokenizer)
        train_reward_model(stage, model=model, examples=examples, heldout=heldout, run=run, save=save, seed=config.seed)
        return _finish(config, "reward-model", model, tokenizer, artifact)


def run_grpo(config: Config, session: Session) -> Artifact:
    """Train with GRPO from `model.weights`, or from random weights where there are none."""
    stage = config.grpo
    artifact = Artifact(Path(config.run_dir) / "hf")
    if _is_done(artifact):
        return artifact
    outputs = stage.prompts_per_rollout * stage.group_size
    _require(
        outputs % stage.minibatch_size == 0,
        f"grpo.minibatch_size={stage.minibatch_size} does not divide the {outputs} outputs of a rollout",
    )
    _require(
        config.rollout.top_p == 1.0,
        "rollout.top_p must be 1 in training: the ratio is over the whole softmax, which top-p would cut",
    )
    _require_no_context_parallel(config)
    arch = build_architecture(config)
    tokenizer = build_tokenizer(config, arch)
    source = _training_problems(config)
    prompts = PromptStream(source, tokenizer, config.data.template, config.seed, config.data.max_prompt_tokens)
    folder = Path(config.run_dir)
    with Run.open(folder, config, "grpo") as run, open_preferences(config, session) as preferences:
        policy = build_policy(
            config,
            session,
            arch,
            optimizer=stage.optimizer,
            moe=stage.moe,
            total_updates=stage.rollouts * math.ceil(outputs / stage.minibatch_size),
            micro_batch_tokens=stage.micro_batch_tokens,
            packed=True,
            temperature=config.rollout.temperature,
            freeze_router=stage.freeze_router,
        )
        from megatron_r1.mcore.policy import ReferencePolicy

        reference = ReferencePolicy(policy) if stage.kl_coef else None
        state = _resume(run, policy, reference)
        if state:
            prompts.load_state_dict(state["prompts"])
        with (
            open_rewards(config, source, folder / "scoring.log", preferences) as rewards,
            open_engine(config, session, arch, tokenizer, folder / "engine.log") as engine,
        ):
            measure = build_evaluation(config, engine, rewards, source, tokenizer)
            train_grpo(
                stage,
                config.rollout,
                policy=policy,
                reference=reference,
                engine=engine,
                rewards=rewards,
                prompts=prompts,
                run=run,
                save=_saver(policy, tokenizer, reference),
                evaluate=lambda step: measure(step, stage.rollouts),
                seed=config.seed,
            )
        return _finish(config, "grpo", policy, tokenizer, artifact)


def _training_problems(config: Config) -> ProblemSource:
    """The problems of `data.source`, and general ones between them towards the end where `data.general_source` is set."""
    stage, reasoning, general = config.grpo, load_problems(config.data), load_general(config.data)
    if general is None:
        return reasoning
    updates_per_rollout = math.ceil(stage.prompts_per_rollout * stage.group_size / stage.minibatch_size)
    first_rollout = max(0, stage.rollouts - math.ceil(stage.general_updates / updates_per_rollout))
    return GeneralMix(reasoning, general, first_rollout * stage.prompts_per_rollout, config.data.general_share)


def _build_gate(
    config: Config, engine: RolloutEngine, rewards: Rewards, policy: MegatronPolicy, source: ProblemSource, tokenizer: Tokenizer
) -> Callable[[], float]:
    """Greedy accuracy on held-out problems with the thinking opened by the prompt: what the base can do, apart from its habits."""
    problems = heldout_prompts(
        source,
        tokenizer,
        config.data.template,
        config.pretrain.gate_problems,
        config.evaluate.seed,
        config.data.max_prompt_tokens,
    )
    prompts = [force_thinking(prompt, tokenizer) for prompt in problems]

    def measure() -> float:
        engine.load_weights(policy.weights(), version=policy.updates)
        groups = engine.generate(prompts, Sampling(1, 0.0, 1.0, config.rollout.max_response_tokens), seed=0)
        rewards.collect(groups)
        return sum(scores(group, "accuracy")[0] for group in groups) / len(groups)

    return measure


def _resume(run: Run, policy: MegatronModel, reference: ReferencePolicy | None = None) -> dict[str, Any] | None:
    """Load the checkpoint that the run goes on from, if there is one, and return the state that was saved with it."""
    from megatron_r1.mcore.checkpoint import load_policy

    if run.resumed_from is not None:
        load_policy(policy, run.resumed_from, reference)
    return run.state


def _saver(policy: MegatronModel, tokenizer: Tokenizer, reference: ReferencePolicy | None = None) -> Write:
    """Makes everything of a checkpoint but the run's state. Config and tokenizer make it a model by itself."""
    from megatron_r1.mcore.checkpoint import plan_policy

    def save(folder: Path) -> Unwritten:
        on_rank_zero(lambda: describe_policy(policy, tokenizer, folder))
        return plan_policy(policy, folder, reference)

    return save


def _finish(config: Config, stage: str, policy: MegatronModel, tokenizer: Tokenizer, artifact: Artifact) -> Artifact:
    """Export the model, seal it with its inputs, and write the report."""
    export_policy(policy, tokenizer, artifact.folder)
    inputs = {"model.weights": config.model.weights, "data.tokenizer": config.data.tokenizer}
    if Path(config.data.source).exists():
        inputs["data.source"] = config.data.source
    if stage == "sft":
        inputs |= {f"sft.sources.{number}": source.path for number, source in enumerate(config.sft.sources)}

    def seal() -> None:
        artifact.seal(stage, config.model_dump(), {name: Path(path) for name, path in inputs.items() if path})
        write_report(Path(config.run_dir))

    on_rank_zero(seal)
    return artifact


def _tell_tokenised(conversations: int) -> None:
    if conversations % 10_000 == 0:
        print(f"sft: {conversations:,} conversations tokenised", file=sys.stderr, flush=True)


def _is_done(artifact: Artifact) -> bool:
    if not broadcast_object(artifact.exists):
        return False
    on_rank_zero(artifact.verify)
    on_rank_zero(lambda: print(f"{artifact.folder} is finished; remove {artifact.folder.parent} to make it again", flush=True))
    return True


def _require_no_context_parallel(config: Config) -> None:
    _require(config.parallel.cp == 1, "parallel.cp above 1 works for pretraining only: packed responses are not cut for it")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
