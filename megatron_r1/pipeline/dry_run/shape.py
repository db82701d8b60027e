"""The shape of a run's model where its weights need not be."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1.config.model import ModelConfig
from megatron_r1.conversion.megatron_folder import holds_megatron
from megatron_r1.errors import CheckpointError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import read_hf_config
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.pipeline.builders.models import find_architecture
from megatron_r1.weights.hf import CONFIG, INDEX, SINGLE

FOR_WANT = ", for want of model.weights"


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
