"""How long responses may be, and what a forward pass must hold for it: GRPO's limits, which may rise in the course of a run.

The limits of a round follow from the updates done before it and from nothing else, so a run that goes on has the right ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError


@dataclass(frozen=True)
class Lengths:
    """Limits of the rounds that begin after some number of updates."""

    after_updates: int  #: of the policy, those left out included
    max_response_tokens: int
    micro_batch_tokens: int  #: targets that a forward pass holds
    response_key: str  #: setting that says `max_response_tokens`, for messages
    micro_batch_key: str  #: setting that says `micro_batch_tokens`


def length_phases(stage: GrpoConfig, rollout: RolloutConfig) -> list[Lengths]:
    """The limits of the first round, and those of `grpo.length_schedule` in its order."""
    first = Lengths(
        0, rollout.max_response_tokens, stage.micro_batch_tokens, "rollout.max_response_tokens", "grpo.micro_batch_tokens"
    )
    phases = [first]
    for number, phase in enumerate(stage.length_schedule):
        key, own = f"grpo.length_schedule.{number}", phase.micro_batch_tokens
        phases.append(
            Lengths(
                phase.after_updates,
                phase.max_response_tokens,
                own or first.micro_batch_tokens,
                f"{key}.max_response_tokens",
                first.micro_batch_key if own is None else f"{key}.micro_batch_tokens",
            )
        )
    return phases


def lengths_after(stage: GrpoConfig, rollout: RolloutConfig, updates: int) -> Lengths:
    """The limits of a round that begins when so many policy updates are done."""
    return [phase for phase in length_phases(stage, rollout) if phase.after_updates <= updates][-1]


def for_longest_response(config: Config) -> Config:
    """The config for the engines of a whole run, which are opened once, for its longest response."""
    return for_responses(config, max(phase.max_response_tokens for phase in length_phases(config.grpo, config.rollout)))


def for_responses(config: Config, tokens: int) -> Config:
    """The config with so many tokens as `rollout.max_response_tokens`, for engines that sample by another limit."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_response_tokens": tokens})})


def check_lengths(config: Config) -> None:
    """Raises ConfigError, with both numbers, if a response at its limit would not fit into a forward pass in some round.

    A prompt and a response of P and R tokens have P + R - 1 targets.
    """
    phases, prompt = length_phases(config.grpo, config.rollout), config.data.max_prompt_tokens
    for before, phase in pairwise(phases):
        if phase.after_updates <= before.after_updates:
            raise ConfigError(
                f"grpo.length_schedule: after_updates={phase.after_updates} does not come after {before.after_updates}; list its "
                "entries in the order of their updates"
            )
    for phase in phases:
        needed = prompt + phase.max_response_tokens - 1
        if phase.micro_batch_tokens < needed:
            raise ConfigError(
                f"{phase.micro_batch_key}={phase.micro_batch_tokens} is less than the {needed} tokens of a prompt with a response "
                f"at its limit (data.max_prompt_tokens={prompt} + {phase.response_key}={phase.max_response_tokens} - 1): raise it "
                f"to {needed}, or lower the limits"
            )
