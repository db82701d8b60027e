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
    known = {name: family.architecture for name, family in families().items()}
    known |= {other: arch for arch in list(known.values()) for other in arch.ALSO_KNOWN_AS}
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(f"model_type is {model_type!r}, supported are {', '.join(known)}")
    try:
        return known[model_type].from_hf_config(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(describe_errors(error)) from error


def describe_errors(error: Exception) -> str:
    """An error on one line; pydantic's with the fields it names."""
    details = getattr(error, "errors", None)
    return "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in details()) if details else str(error)
