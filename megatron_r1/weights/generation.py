"""What a published folder says of generation beside its weights: it goes with the model, whatever trains it here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError
from megatron_r1.weights.hf import CONFIG

GENERATION_CONFIG = "generation_config.json"
_ENDS = "eos_token_id"


@dataclass(frozen=True)
class Generation:
    """generation_config.json, and every token that ends a response."""

    settings: Mapping[str, Any] = field(default_factory=dict)  #: generation_config.json; empty if there is none
    config_ends: tuple[int, ...] = ()  #: as config.json has them
    generation_ends: tuple[int, ...] = ()  #: as generation_config.json has them

    def ends(self, eos_token_id: int) -> int | list[int]:
        """What config.json of the trained model gets.

        Args:
            eos_token_id: the tokenizer's, with which the model was trained to end.
        """
        return _joined(self.config_ends, eos_token_id)

    def ending_also_with(self, ends: Sequence[int]) -> Generation:
        """The same with further ends in both files, if neither has them."""
        new = [end for end in ends if end not in (*self.config_ends, *self.generation_ends)]
        if not new:
            return self
        generation_ends = (*self.generation_ends, *new) if self.generation_ends else ()
        return replace(self, config_ends=(*self.config_ends, *new), generation_ends=generation_ends)

    def to_json(self, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
        """What generation_config.json of the trained model gets."""
        if not self.settings:
            return {"_from_model_config": True, "bos_token_id": bos_token_id, _ENDS: self.ends(eos_token_id)}
        return {**self.settings, _ENDS: _joined(self.generation_ends or self.config_ends, eos_token_id)}


def read_generation(folder: Path | None, vocab_size: int) -> Generation:
    """What `folder` says; nothing if there is no folder. Published chat models name several ends: of a turn, of a document.

    Raises:
        CheckpointError: a file that is no object of JSON, or ends of sequence that are no tokens.
    """
    if folder is None:
        return Generation()
    config, settings = (_read_object(folder / name) for name in (CONFIG, GENERATION_CONFIG))
    config_ends = _read_ends(config, folder / CONFIG, vocab_size)
    return Generation(settings, config_ends, _read_ends(settings, folder / GENERATION_CONFIG, vocab_size))


def _joined(ends: tuple[int, ...], eos_token_id: int) -> int | list[int]:
    """One end as a number, as published folders write it."""
    every = list(dict.fromkeys((*ends, eos_token_id)))
    return every[0] if len(every) == 1 else every


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be used: it holds no object")
    return content


def _read_ends(content: Mapping[str, Any], path: Path, vocab_size: int) -> tuple[int, ...]:
    value = content.get(_ENDS)
    ends = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(end, int) and not isinstance(end, bool) and 0 <= end < vocab_size for end in ends):
        raise CheckpointError(f"{path}: {_ENDS} is {value!r}, but the model's tokens are 0 to {vocab_size - 1}")
    return tuple(ends)
