"""Finds the model families: every module in `families/`, and those that installed packages announce.

A family's module has `FAMILY`, a subclass of `Architecture`, and may have `PRESETS`, named shapes of it. A package outside of this
one announces its module as an entry point of the group `megatron_r1.model_families`.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType

from megatron_r1.errors import ConfigError
from megatron_r1.model import families as own_families
from megatron_r1.model.architecture import Architecture

ENTRY_POINTS = "megatron_r1.model_families"


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    architecture: type[Architecture]
    presets: dict[str, Architecture]
    module: str  #: where it is defined


@cache
def families() -> dict[str, Family]:
    """All families by their `model_type`, this package's own first, each in the order of their names.

    Raises:
        ConfigError: a module that cannot be imported or defines no family, or two that define the same `model_type` or preset.
    """
    own = sorted(module.name for module in pkgutil.iter_modules(own_families.__path__))
    announced = sorted(entry.value for entry in entry_points(group=ENTRY_POINTS))
    found: dict[str, Family] = {}
    for name in [*(f"{own_families.__name__}.{name}" for name in own), *announced]:
        family = _read_family(name)
        model_type = family.architecture.model_fields["model_type"].default
        others = [other for other in found.values() if family.presets.keys() & other.presets.keys()]
        for other in [found[model_type]] if model_type in found else others:
            raise ConfigError(f"model families {other.module} and {name} define the same model_type or preset: rename it in one")
        found[model_type] = family
    return found


def vllm_fused_parts() -> dict[str, tuple[str, ...]]:
    """Of all families: last part of the name of a tensor of vLLM -> those of the Hugging Face tensors that it holds, in order."""
    return {fused: parts for family in families().values() for fused, parts in family.architecture.VLLM_FUSED.items()}


def _read_family(name: str) -> Family:
    try:
        module: ModuleType = import_module(name)
    except Exception as error:  # an announced module may fail in any way
        raise ConfigError(f"model family {name} cannot be imported: {type(error).__name__}: {error}") from error
    architecture = getattr(module, "FAMILY", None)
    if not (isinstance(architecture, type) and issubclass(architecture, Architecture)):
        raise ConfigError(f"model family {name} does not define FAMILY, a subclass of megatron_r1.model.architecture.Architecture")
    if not isinstance(architecture.model_fields["model_type"].default, str):
        raise ConfigError(f'model family {name}: {architecture.__name__}.model_type has no default, write Literal["..."] = "..."')
    return Family(architecture, dict(getattr(module, "PRESETS", {})), name)
