"""From a config to the models that a stage trains: architecture, tokenizer, policy and reward model.

`mcore.policy` and its siblings are imported inside functions: on a machine without CUDA, Megatron-Core must be loaded through
`mcore.host`, which `open_session` prepares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.rates import RatesOf
from megatron_r1.config.schema import Config
from megatron_r1.conversion.model_shape import find_architecture, megatron_weights, require_language_model, reward_architecture
from megatron_r1.data.tally.tokenizer import train_generated_tokenizer
from megatron_r1.data.tokenizer import Tokenizer, check_tokenizer_fits
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout, group_sizes, resolve_layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.session import Session
from megatron_r1.runtime.checkpoints import verify_checkpoint
from megatron_r1.runtime.open_files import needed_file_descriptors, require_open_files
from megatron_r1.weights.generation import read_generation

if TYPE_CHECKING:
    from megatron_r1.mcore.megatron_model import MegatronModel
    from megatron_r1.mcore.policy import MegatronPolicy
    from megatron_r1.mcore.reward_model import MegatronRewardModel


def build_architecture(model: ModelConfig) -> Architecture:
    """The shape of the language model in `model.weights`, else of the preset.

    Raises:
        ConfigError: unknown preset or fields, overrides that a folder would make meaningless, or a reward model.
        CheckpointError: no such folder, or one of another architecture.
    """
    arch = find_architecture(model)
    require_language_model(arch, model.weights)
    return arch


def model_folder(model: ModelConfig) -> Path | None:
    """The folder in which config.json of `model.weights` stands; None without one."""
    return megatron_weights(model) or (None if model.weights is None else Path(model.weights))


def require_weights(model: ModelConfig, wanted: str) -> Path:
    """The folder in `model.weights`.

    Args:
        wanted: completes the error message: what the setting should name.

    Raises:
        ConfigError: `model.weights` is not set.
    """
    if model.weights is None:
        raise ConfigError(f"model.weights is not set: give {wanted}")
    return Path(model.weights)


def build_tokenizer(data: DataConfig, model: ModelConfig, arch: Architecture) -> Tokenizer:
    """`data.tokenizer`, else the tokenizer beside `model.weights`, else, for generated data alone, one trained on the spot.

    Raises:
        ConfigError: there is none, or it is larger than the model's vocabulary.
        DataError: a folder without a readable tokenizer.
    """
    folder = data.tokenizer or model_folder(model)
    if folder is not None:
        tokenizer = Tokenizer.load(folder)
    elif data.source in ("tally", "tally_chat") and not data.blend:
        tokenizer = train_generated_tokenizer(data.source, arch.vocab_size, data.template, data.heldout_fraction)
    else:
        raise ConfigError(
            "data.tokenizer is not set and no model.weights has one beside it: make one with tools/train_tokenizer.py"
        )
    check_tokenizer_fits(tokenizer, arch, shape_is_given=model.weights is not None)
    return tokenizer


def resolve_policy_layout(config: Config, arch: Architecture, world_size: int, *, moe: MoeTrainingConfig) -> Layout:
    """The layout of a policy on so many ranks. Raises ConfigError if it does not fit them, the model or Megatron-Core."""
    mtp = moe.mtp_loss_scale > 0 and arch.mtp_depth > 0
    stages = config.megatron.pipeline_model_parallel_layout
    return resolve_layout(config.parallel, arch, world_size, mtp=mtp, stages=stages)


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
    ema_decay: float | None = None,
    share_prompts: Literal["auto", "always", "never"] = "never",
    exact_entropy: bool = False,
    rates: RatesOf | None = None,
) -> MegatronPolicy:
    """The policy on this job's layout, with the weights of `model.weights` or fresh ones.

    Args:
        rates: see `MegatronModel`.

    Raises:
        ConfigError: the layout does not fit the number of processes, the model or Megatron-Core, or the model needs Transformer
            Engine.
    """
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.layers_needed import require_layers_for
    from megatron_r1.mcore.policy import MegatronPolicy
    from megatron_r1.mcore.shared_prompts import shares_prompts

    require_layers_for(arch, config.runtime)
    layout = resolve_policy_layout(config, arch, session.launch.world_size, moe=moe)
    require_open_files(needed_file_descriptors(layout.world_size, group_sizes(layout)))
    parallel.build_process_groups(layout, config.seed)
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
        megatron=config.megatron,
        packed=packed,
        ema_decay=ema_decay,
        share_prompts=shares_prompts(share_prompts, arch, layout, moe, session.device.kind),
        exact_entropy=exact_entropy,
        rates=rates,
    )
    _load_given_weights(config.model, policy)
    session.tell_threads()
    return policy


def build_reward_model(
    config: Config, session: Session, *, label: str | None, optimizer: OptimizerConfig | None, total_updates: int
) -> MegatronRewardModel:
    """A reward model on this job's layout: the one in `model.weights`, or a fresh head on the language model there.

    Args:
        label: what its score means (`Architecture.score_label`). None: `model.weights` must be a reward model and says it.
        optimizer: None if the model only scores.

    Raises:
        ConfigError: `model.weights` is no reward model but must be one, or its label is another; the layout does not fit.
    """
    from megatron_r1.mcore import parallel
    from megatron_r1.mcore.layers_needed import require_layers_for
    from megatron_r1.mcore.reward_model import MegatronRewardModel

    found, weights = find_architecture(config.model), config.model.weights
    arch = reward_architecture(found, weights, label)
    require_layers_for(arch, config.runtime)
    stages = config.megatron.pipeline_model_parallel_layout
    layout = resolve_layout(config.parallel, arch, session.launch.world_size, mtp=False, stages=stages)
    require_open_files(needed_file_descriptors(layout.world_size, group_sizes(layout)))
    parallel.build_process_groups(layout, config.seed)
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
        megatron=config.megatron,
    )
    _load_given_weights(config.model, model, trunk_of=None if found.is_reward_model else found)
    session.tell_threads()
    return model


def _load_given_weights(config: ModelConfig, model: MegatronModel, trunk_of: Architecture | None = None) -> None:
    """Load `model.weights` if it is set, and note what it says of generation.

    Args:
        trunk_of: the language model that `model.weights` holds, if `model` is a reward model that shares its layers.
    """
    if megatron := megatron_weights(config):
        model.generation = read_generation(megatron, model.arch.vocab_size)
        from megatron_r1.mcore.checkpoint import load_policy_weights

        verify_checkpoint(megatron)
        load_policy_weights(model, megatron, trunk_only=trunk_of is not None)
    elif config.weights is not None:
        model.generation = read_generation(Path(config.weights), model.arch.vocab_size)
        model.load_hf(Path(config.weights), trunk_of)
