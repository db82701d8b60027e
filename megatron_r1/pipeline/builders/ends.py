"""Which tokens end a response."""

from __future__ import annotations

from megatron_r1.config.model import ModelConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.models import model_folder
from megatron_r1.weights.generation import read_generation


def find_end_tokens(model: ModelConfig, arch: Architecture, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's end of sequence, then those that config.json and generation_config.json of `model.weights` name besides.

    Published chat models name several: one that ends a turn, one that ends a document.

    Raises:
        CheckpointError: a file that cannot be read, or names something else than tokens of the model.
    """
    said = read_generation(model_folder(model), arch.vocab_size)
    return tuple(dict.fromkeys([tokenizer.eos_id, *said.config_ends, *said.generation_ends]))
