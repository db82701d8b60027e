"""The scorers there are, by name, and how a worker builds one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.errors import RewardError
from megatron_r1.rewards.protocol import Scorer

#: name -> "module:class"; imported only where the scorer is built
SCORERS = {
    "math": "megatron_r1.rewards.math_answer:MathScorer",
    "code": "megatron_r1.rewards.code:CodeScorer",
    "format": "megatron_r1.rewards.format:FormatScorer",
    "language": "megatron_r1.rewards.language:LanguageScorer",
}


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer to build in a worker process, and how long it may take over one response."""

    target: str  #: "module:class", from `SCORERS`
    time_limit_seconds: float  #: wall time of one `judge` call, from the start of the work
    settings: Mapping[str, Any] = field(default_factory=dict)  #: keyword arguments of the class; must fit JSON


def build_scorer(target: str, settings: Mapping[str, Any]) -> Scorer:
    """Import and build one scorer.

    Raises:
        RewardError: it cannot be built here; the message is one line.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(**settings)
    except RewardError:
        raise
    except Exception as error:  # whatever a library raises at import, the user reads one line
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RewardError(f"the scorer {target} cannot be built: {reason}") from error
