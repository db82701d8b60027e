"""From a Hugging Face `config.json` to the architecture that it describes."""

from __future__ import annotations

from typing import Any

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.registry import families


def read_hf_config(config: dict[str, Any]) -> Architecture:
    """The shape of the model.

    Raises:
        ValueError: an architecture that this project does not have, or a field that it cannot take; the message is one line.
    """
    model_type = config.get("model_type")
    known = families()
    if model_type not in known:
        raise ValueError(f"model_type is {model_type!r}, supported are {', '.join(known)}")
    try:
        return known[model_type].architecture.from_hf_config(config)
    except ValueError as error:
        raise ValueError(describe_errors(error)) from error


def describe_errors(error: ValueError) -> str:
    """A ValueError on one line; pydantic's with the fields it names."""
    details = getattr(error, "errors", None)
    return "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in details()) if details else str(error)
