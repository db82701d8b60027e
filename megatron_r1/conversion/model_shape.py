"""The shape of a run's model, from `model.weights` or the preset; for a plan, also where its weights need not be."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1.config.model import ModelConfig
from megatron_r1.conversion.megatron_folder import find_megatron_folder, holds_megatron, megatron_architecture
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.weights.hf import CONFIG, INDEX, SINGLE, HfFolder
from megatron_r1.weights.mapping import hf_shapes, repeated_names

FOR_WANT = ", for want of model.weights"


def find_architecture(model: ModelConfig) -> Architecture:
    """The shape of the language model or reward model in `model.weights`, else of the preset.

    Raises:
        ConfigError, CheckpointError: see `builders.models.build_architecture`.
    """
    if model.weights is None:
        return resolve_architecture(model.preset, model.overrides)
    if model.overrides:
        raise ConfigError("model.overrides would have no effect on the folder in model.weights: drop one of the two")
    megatron = megatron_weights(model)
    if megatron is not None:
        return megatron_architecture(megatron)
    folder = HfFolder(Path(model.weights))
    arch = folder.architecture()
    folder.check_kinds(hf_shapes(arch), repeated_names(arch))  # before a model of a config.json that lies takes all memory
    return arch


def require_language_model(arch: Architecture, weights: str | None) -> None:
    """Raises ConfigError if the model that `weights` hold is a reward model."""
    if arch.is_reward_model:
        raise ConfigError(f"model.weights={weights} is a reward model, which writes no text: give a language model")


def reward_architecture(found: Architecture, weights: str | None, label: str | None) -> Architecture:
    """The shape of a reward model on `found`, which `weights` hold; see `builders.models.build_reward_model`."""
    if label is None and not found.is_reward_model:
        raise ConfigError(f"model.weights={weights} is no reward model: make one of it with megatron-r1 reward-model")
    if found.is_reward_model and label not in (None, found.score_label):
        raise ConfigError(f"model.weights={weights} is a reward model for {found.score_label!r}, reward_model.kind is {label!r}")
    return found if label is None or found.is_reward_model else found.as_reward_model(label)


def shape_of_model(model: ModelConfig) -> tuple[Architecture, str]:
    """The architecture, and where it was found: `model.weights`, its config.json alone, or the preset if the folder is not here.

    Raises:
        ConfigError, CheckpointError: see `find_architecture`.
    """
    if model.weights is None:
        return find_architecture(model), f"model.preset={model.preset}"
    folder = Path(model.weights)
    if not folder.exists():
        return resolve_architecture(model.preset, model.overrides), f"model.preset={model.preset}{FOR_WANT}"
    if (folder / CONFIG).is_file() and not holds_megatron(folder) and not any((folder / name).exists() for name in (INDEX, SINGLE)):
        return _shape_of_config(folder / CONFIG), f"{folder / CONFIG}, which has no weights beside it"
    return find_architecture(model), str(folder)


def _shape_of_config(path: Path) -> Architecture:
    try:
        return read_hf_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError, AttributeError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split()):.300}") from None


def megatron_weights(model: ModelConfig) -> Path | None:
    """The checkpoint that `model.weights` is or holds; None if it is a Hugging Face folder or not set."""
    if model.weights is None or not holds_megatron(Path(model.weights)):
        return None
    return find_megatron_folder(Path(model.weights))
