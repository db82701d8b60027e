"""Which tokens end a response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1.config.model import ModelConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import CheckpointError
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.models import model_folder
from megatron_r1.weights.hf import CONFIG
from megatron_r1.weights.hf_export import GENERATION_CONFIG

_KEY = "eos_token_id"


def find_end_tokens(model: ModelConfig, arch: Architecture, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's end of sequence, then those that config.json and generation_config.json of `model.weights` name besides.

    Published chat models name several: one that ends a turn, one that ends a document.

    Raises:
        CheckpointError: a file that cannot be read, or names something else than tokens of the model.
    """
    folder = model_folder(model)
    files = [] if folder is None else [path for path in (folder / CONFIG, folder / GENERATION_CONFIG) if path.is_file()]
    return tuple(dict.fromkeys([tokenizer.eos_id, *(end for path in files for end in _read_ends(path, arch.vocab_size))]))


def _read_ends(path: Path, vocab_size: int) -> list[int]:
    try:
        content: Any = json.loads(path.read_text())
        named = content.get(_KEY)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    ends = [] if named is None else named if isinstance(named, list) else [named]
    for end in ends:
        if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < vocab_size:
            raise CheckpointError(f"{path}: {_KEY} is {named!r}, but the model's tokens are 0 to {vocab_size - 1}")
    return ends
