"""From a config to the objects that a stage runs on. The only module that names the concrete engines.

`mcore.policy` and its siblings are imported inside functions: on a machine without CUDA, Megatron-Core must be loaded through
`mcore.host`, which `open_session` prepares.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_r1.config.schema import Config, MoeTrainingConfig, OptimizerConfig
from megatron_r1.conversion.megatron_folder import find_megatron_folder, holds_megatron, megatron_architecture
from megatron_r1.data.problems import ProblemSource
from megatron_r1.data.prompts import heldout_prompts
from megatron_r1.data.tally.tokenizer import train_generated_tokenizer
from megatron_r1.data.tokenizer import Tokenizer, check_tokenizer_fits
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.evaluate import evaluate
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.pipeline.builders.placement import EnginePlace, place_engine
from megatron_r1.pipeline.session import Session
from megatron_r1.rewards.compose import Composition, Scoring, judge_reward
from megatron_r1.rewards.judge.preference import Judge
from megatron_r1.rewards.scorers import needed_scorers, scorer_specs
from megatron_r1.rewards.workers.process import Limits
from megatron_r1.rewards.workers.scoring_engine import ScoringEngine
from megatron_r1.rollout.collective import CollectiveEngine
from megatron_r1.rollout.multi_node import FollowingPart
from megatron_r1.rollout.options import engine_options
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.runtime.checkpoints import verify_checkpoint
from megatron_r1.runtime.distributed import failing_together
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.launch import address_towards, child_environment
from megatron_r1.runtime.peers import Peers, find_peers
from megatron_r1.training.scoring import CollectiveRewards, Preferences
from megatron_r1.weights.hf import HfFolder
from megatron_r1.weights.hf_export import export_hf
from megatron_r1.weights.rank_zero import consume_on_rank_zero

if TYPE_CHECKING:
    from megatron_r1.mcore.megatron_model import MegatronModel
    from megatron_r1.mcore.policy import MegatronPolicy
    from megatron_r1.mcore.reward_model import MegatronRewardModel


def build_architecture(config: Config) -> Architecture:
    """The shape of the language model in `model.weights`, else of the preset.

    Raises:
        ConfigError: unknown preset or fields, overrides that a folder would make meaningless, or a reward model.
        CheckpointError: no such folder, or one of another architecture.
    """
    arch = find_architecture(config)
    if arch.is_reward_model:
        raise ConfigError(f"model.weights={config.model.weights} is a reward model, which writes no text: give a language model")
    return arch


def find_architecture(config: Config) -> Architecture:
    """The same of a language model or a reward model, whichever it is."""
    if config.model.weights is None:
        return resolve_architecture(config.model.preset, config.model.overrides)
    if config.model.overrides:
        raise ConfigError("model.overrides would have no effect on the folder in model.weights: drop one of the two")
    megatron = _megatron_weights(config)
    return megatron_architecture(megatron) if megatron is not None else HfFolder(Path(config.model.weights)).architecture()


def build_tokenizer(config: Config, arch: Architecture) -> Tokenizer:
    """`data.tokenizer`, else the tokenizer beside `model.weights`, else, for generated data alone, one trained on the spot.

    Raises:
        ConfigError: there is none, or it is larger than the model's vocabulary.
        DataError: a folder without a readable tokenizer.
    """
    folder = config.data.tokenizer or _megatron_weights(config) or config.model.weights
    if folder is not None:
        tokenizer = Tokenizer.load(folder)
    elif config.data.source in ("tally", "tally_chat"):
        tokenizer = train_generated_tokenizer(
            config.data.source, arch.vocab_size, config.data.template, config.data.heldout_fraction
        )
    else:
        raise ConfigError(
            "data.tokenizer is not set and no model.weights has one beside it: make one with tools/train_tokenizer.py"
        )
    check_tokenizer_fits(tokenizer, arch)
    return tokenizer


def build_policy(
    config: Config,
    session: Session,
    arch: Architecture,
    *,
    optimizer: OptimizerConfig,
    moe: MoeTrainingConfig,
    total_updates: int,
    micro_batch_tokens: int,
    packed: bool,
    temperature: float = 1.0,
    freeze_router: bool = False,
) -> MegatronPolicy:
    """The policy on this job's layout, with the weights of `model.weights` or fresh ones.

    Raises:
        ConfigError: the layout does not fit the number of processes, the model or Megatron-Core.
    """
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.policy import MegatronPolicy

    mtp = moe.mtp_loss_scale > 0 and arch.num_nextn_predict_layers > 0
    layout = parallel.resolve_layout(config.parallel, arch, session.launch.world_size, mtp=mtp, packed=packed)
    parallel.initialize(layout, config.seed)
    policy = MegatronPolicy(
        arch,
        layout,
        config.runtime,
        moe,
        optimizer=optimizer,
        total_updates=total_updates,
        seed=config.seed,
        device=session.device.torch_device,
        micro_batch_tokens=micro_batch_tokens,
        temperature=temperature,
        freeze_router=freeze_router,
    )
    _load_weights(config, policy)
    return policy


def build_reward_model(
    config: Config, session: Session, *, label: str | None, optimizer: OptimizerConfig | None, total_updates: int
) -> MegatronRewardModel:
    """A reward model on this job's layout: that of `model.weights`, or a fresh head on the language model that stands there.

    Args:
        label: what it says (`Architecture.score_label`); None: what that of `model.weights` says, which then must be one.
        optimizer: None for one that only scores.

    Raises:
        ConfigError: no reward model where there must be one, or one that says something else; a layout that does not fit.
    """
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.reward_model import MegatronRewardModel

    found, weights = find_architecture(config), config.model.weights
    if label is None and not found.is_reward_model:
        raise ConfigError(f"model.weights={weights} is no reward model: make one of it with megatron-r1 reward-model")
    if found.is_reward_model and label not in (None, found.score_label):
        raise ConfigError(f"model.weights={weights} is a reward model for {found.score_label!r}, reward_model.kind is {label!r}")
    arch = found if label is None or found.is_reward_model else found.as_reward_model(label)
    layout = parallel.resolve_layout(config.parallel, arch, session.launch.world_size, mtp=False, packed=True)
    parallel.initialize(layout, config.seed)
    model = MegatronRewardModel(
        arch,
        layout,
        config.runtime,
        config.reward_model.moe,
        optimizer=optimizer,
        total_updates=total_updates,
        seed=config.seed,
        device=session.device.torch_device,
        micro_batch_tokens=config.reward_model.micro_batch_tokens,
    )
    _load_weights(config, model, trunk_of=None if found.is_reward_model else found)
    return model


def _load_weights(config: Config, model: MegatronModel, trunk_of: Architecture | None = None) -> None:
    """Take the weights of `model.weights`, where it is set. `trunk_of`: of this language model, for a reward model."""
    if megatron := _megatron_weights(config):
        from megatron_r1.mcore.checkpoint import load_policy_weights

        verify_checkpoint(megatron)
        load_policy_weights(model, megatron, trunk_only=trunk_of is not None)
    elif config.model.weights is not None:
        model.load_hf(Path(config.model.weights), trunk_of)


@contextmanager
def open_engine(config: Config, session: Session, arch: Architecture, tokenizer: Tokenizer, log: Path) -> Iterator[RolloutEngine]:
    """The vLLM engines for the block, as `rollout.placement` says, used by all ranks.

    Args:
        log: takes all output of the engine process beside rank 0; those of other ranks have their number in the name.
    """
    with failing_together():
        place = place_engine(config.rollout, session.launch, session.device.kind)
    number = session.launch.rank
    log = log if number == 0 else log.with_name(f"{log.stem}_{number:05d}{log.suffix}")
    peers = _find_peers(config, session, place)
    start = None if place is None else partial(_start_engine, config, session, arch, tokenizer, log, place, peers)
    engine = CollectiveEngine(start, config.rollout.restarts, peers)
    try:
        yield engine
    finally:
        engine.close()


def _find_peers(config: Config, session: Session, place: EnginePlace | None) -> Peers | None:
    """Of this rank, where its engine spans the nodes of several ranks. All ranks call this."""
    ranks = () if place is None else place.ranks
    with failing_together():
        address = address_towards(session.launch.master_address) if ranks else ""
    return find_peers(ranks, address, config.runtime.collective_timeout_seconds)


def _start_engine(
    config: Config,
    session: Session,
    arch: Architecture,
    tokenizer: Tokenizer,
    log: Path,
    place: EnginePlace,
    peers: Peers | None,
) -> RolloutEngine | FollowingPart:
    options = engine_options(
        arch,
        config.rollout,
        device=session.device.kind,
        dtype="bfloat16" if config.runtime.dtype == "bf16" else "float32",
        bos_token_id=_bos_id(tokenizer),
        eos_token_id=tokenizer.eos_id,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    environment, threads = child_environment(place.variables), config.runtime.threads
    if peers is not None and peers.number:
        return FollowingPart(options, environment, log, threads, peers)
    return VllmProcessEngine(options, tokenizer.decode, environment, log, threads, place.servers, peers)


def open_scoring(config: Config, domains: Iterable[str], log: Path) -> ScoringEngine:
    """Scoring processes for problems of these domains, as a context manager.

    Args:
        log: takes all output of the scoring processes.
    """
    rewards = config.reward
    log.parent.mkdir(parents=True, exist_ok=True)
    return ScoringEngine(
        scorer_specs(rewards, needed_scorers(rewards, domains), config.data.template),
        workers=rewards.workers,
        limits=Limits(rewards.worker_memory_bytes, rewards.worker_recycle_bytes),
        # A whole rollout fits, with every component: a full queue would hold up the generation that fills it.
        max_pending=4 * config.grpo.prompts_per_rollout * config.grpo.group_size,
        environment=child_environment(),
        log=log,
    )


@contextmanager
def open_rewards(
    config: Config, source: ProblemSource, log: Path, preferences: Preferences | None = None
) -> Iterator[CollectiveRewards]:
    """The rewards for the block: scoring processes beside rank 0, used by all ranks.

    Args:
        source: the problems whose responses will be scored; what none of them needs is not started.
        log: takes all output of the scoring processes.
        preferences: reward models for general prompts.
    """
    rewards = config.reward
    with ExitStack() as stack:

        def start() -> Composition:
            scoring: Scoring = stack.enter_context(open_scoring(config, source.domains(), log))
            judge = stack.enter_context(Judge(rewards.judge)) if rewards.model == "judge" else None
            return Composition(rewards, scoring, judge_reward(judge) if judge else None)

        yield CollectiveRewards(rewards, start, preferences)


def build_evaluation(
    config: Config, engine: RolloutEngine, rewards: CollectiveRewards, source: ProblemSource, tokenizer: Tokenizer
) -> Callable[[int, int], dict[str, float]]:
    """A function of (step, last step) that measures the engine's weights on held-out problems where it is due, else nothing.

    It is due before the first step, after the last, and every `evaluate.interval` steps.
    """
    prompts = heldout_prompts(
        source, tokenizer, config.data.template, config.evaluate.problems, config.evaluate.seed, config.data.max_prompt_tokens
    )

    def measure(step: int, last: int) -> dict[str, float]:
        interval = config.evaluate.interval
        if step not in (0, last) and not (interval and step % interval == 0):
            return {}
        result = asdict(evaluate(engine, prompts, rewards.collect, config.evaluate, config.rollout.max_response_tokens))
        intervals = result.pop("intervals")
        low_high = {
            f"eval/{_key(name)}/{end}": value for name, pair in intervals.items() for end, value in zip(("low", "high"), pair)
        }
        return {f"eval/{_key(name)}": value for name, value in result.items()} | low_high

    return measure


def export_policy(policy: MegatronModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the policy's weights and its tokenizer as a Hugging Face folder, collectively."""
    tokenizer_folder = folder.with_name(f".{folder.name}.tokenizer")

    def write(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tokenizer.save(tokenizer_folder)
        export_hf(
            weights,
            policy.arch,
            folder,
            bos_token_id=_bos_id(tokenizer),
            eos_token_id=tokenizer.eos_id,
            tokenizer=tokenizer_folder,
        )
        shutil.rmtree(tokenizer_folder)

    consume_on_rank_zero(policy.weights(), write)


def describe_policy(policy: MegatronModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json and the tokenizer into a folder of Megatron weights, so that it can be exported by itself."""
    dtype = str(policy.modules[0].config.params_dtype).removeprefix("torch.")
    config = policy.arch.to_hf_config(_bos_id(tokenizer), tokenizer.eos_id, dtype)
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder)


def _megatron_weights(config: Config) -> Path | None:
    """The checkpoint that `model.weights` is or holds; None where it is a Hugging Face folder or not set."""
    if config.model.weights is None or not holds_megatron(Path(config.model.weights)):
        return None
    return find_megatron_folder(Path(config.model.weights))


def _bos_id(tokenizer: Tokenizer) -> int:
    # config.json wants a number; a vocabulary without beginning-of-sequence never produces it.
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def _key(name: str) -> str:
    return {"pass_at_1": "pass@1", "pass_at_k": "pass@k"}.get(name, name)
