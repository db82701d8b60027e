"""Which changes of `pretrain.phases` make a run longer and leave alone what it was trained with."""

from __future__ import annotations

from typing import Any

from megatron_r1.config.pretrain import PretrainConfig, PretrainPhase
from megatron_r1.errors import ConfigError

_UNITS = ("tokens", "updates")


def phases_of(stage: PretrainConfig) -> list[PretrainPhase]:
    """The phases of a run; without `pretrain.phases` it is one of `pretrain.steps` updates."""
    return stage.phases or [PretrainPhase(updates=stage.steps)]


def are_longer(before: PretrainConfig, now: PretrainConfig, where: str) -> bool:
    """Compare the phases of a run with those that it is to go on with.

    Every update of the run so far keeps its rows and rates: a phase that is longer begins as it did, batch ramp and learning rate
    included, which are in tokens of the phase.

    Args:
        where: begins the message, see `resume.check_settings`.

    Returns:
        Whether they are longer; else they are the same.

    Raises:
        ConfigError: they are others; one line.
    """
    old, new = phases_of(before), phases_of(now)
    if len(new) < len(old):
        raise _other(where, f"{len(old)} entries in pretrain.phases", f"{len(new)}")
    for number, (was, is_now) in enumerate(zip(old, new, strict=False)):
        _compare_phase(where, f"pretrain.phases.{number}", was, is_now, is_last=number == len(old) - 1)
    if not _grow(old, new):
        return False
    if before.gate_accuracy and before.gate_extra_steps:
        raise ConfigError(
            f"{where} pretrain.gate_extra_steps={before.gate_extra_steps}, whose updates stand behind the last phase: its phases "
            "can be neither longer nor more; choose another run_dir"
        )
    return True


def follow_schedule(stage: PretrainConfig) -> bool:
    """Whether some update takes its learning rate from `pretrain.optimizer`'s schedule, which goes over the whole run."""
    return not all(phase.learning_rate for phase in phases_of(stage))


def _grow(old: list[PretrainPhase], new: list[PretrainPhase]) -> bool:
    last = new[len(old) - 1]
    return len(new) > len(old) or any(getattr(old[-1], unit) != getattr(last, unit) for unit in _UNITS)


def _compare_phase(where: str, key: str, was: PretrainPhase, is_now: PretrainPhase, *, is_last: bool) -> None:
    after = _defined_by(is_now)
    for name, value in _defined_by(was).items():
        found = after[name]
        grows = is_last and name in _UNITS and None not in (value, found) and found > value
        if found != value and not grows:
            shown = [phase.model_dump()[name] for phase in (was, is_now)]
            raise _other(where, f"{key}.{name}={shown[0]!s:.200}", f"{shown[1]!s:.200}")


def _defined_by(phase: PretrainPhase) -> dict[str, Any]:
    """A phase without its part of the layout, and without the paths of its sources, whose content counts."""
    found = phase.model_dump()
    return {**found, "cp": None, "blend": [source | {"path": ""} for source in found["blend"]]}


def _other(where: str, was: str, is_now: str) -> ConfigError:
    return ConfigError(
        f"{where} {was}, now it is {is_now}: it says what an update does; keep the value, or choose another run_dir: of phases "
        "only the last one may be longer, and others may follow it"
    )
