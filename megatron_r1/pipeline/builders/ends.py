"""Which tokens end a response."""

from __future__ import annotations

from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.data.chat.tokenizer_template import TokenizerTemplate
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.models import model_folder
from megatron_r1.weights.generation import Generation, read_generation


def find_end_tokens(
    model: ModelConfig, arch: Architecture, tokenizer: Tokenizer, data: DataConfig | None = None
) -> tuple[int, ...]:
    """The tokenizer's end of sequence, those that config.json and generation_config.json of `model.weights` name, the template's.

    Published chat models name several: one that ends a turn, one that ends a document.

    Args:
        data: names the template.

    Raises:
        CheckpointError: a file that cannot be read, or names something else than tokens of the model.
    """
    said = read_generation(model_folder(model), arch.vocab_size)
    turn = () if data is None else end_of_turn(data, tokenizer)
    return tuple(dict.fromkeys([tokenizer.eos_id, *said.config_ends, *said.generation_ends, *turn]))


def end_of_turn(data: DataConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that a tokenizer's own template puts after a reply: models without it in their files learn to write it, too."""
    if data.template != "tokenizer":
        return ()
    end = TokenizerTemplate(tokenizer, data.template_arguments).end_of_turn()
    return () if end is None else (end,)


def with_end_of_turn(generation: Generation, data: DataConfig, tokenizer: Tokenizer) -> Generation:
    """What goes with a model that was trained with this template, so that servers end where its training did."""
    return generation.ending_also_with([end for end in end_of_turn(data, tokenizer) if end != tokenizer.eos_id])
