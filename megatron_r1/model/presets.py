"""Named shapes, from the quickstart's to DeepSeek-V3's, as the families define them."""

from __future__ import annotations

from megatron_r1.errors import ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.hf_config import describe_errors
from megatron_r1.model.registry import families

PRESETS: dict[str, Architecture] = {name: arch for family in families().values() for name, arch in family.presets.items()}


def resolve_architecture(preset: str, overrides: dict | None = None) -> Architecture:
    """The preset's shape with some fields replaced.

    Raises:
        ConfigError: unknown preset, unknown field or values that contradict each other.
    """
    if preset not in PRESETS:
        raise ConfigError(f"model.preset={preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    shape = PRESETS[preset]
    unknown = set(overrides or {}) - set(type(shape).model_fields)
    if unknown:
        raise ConfigError(
            f"model.overrides has unknown fields {sorted(unknown)}; the fields are those of the Hugging Face config.json"
        )
    try:
        return type(shape)(**{**shape.model_dump(), **(overrides or {})})
    except ValueError as error:
        raise ConfigError(f"model.overrides: {describe_errors(error)}") from error
