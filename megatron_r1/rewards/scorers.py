"""The scorers there are, by name, and how a worker builds one."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_r1.errors import RewardError
from megatron_r1.rewards.protocol import Scorer
from megatron_r1.tags import THINK_OPEN

if TYPE_CHECKING:
    from megatron_r1.config.rewards import RewardConfig

#: name -> "module:class"; imported only where the scorer is built
SCORERS = {
    "math": "megatron_r1.rewards.math.scorer:MathScorer",
    "code": "megatron_r1.rewards.code.scorer:CodeScorer",
    "format": "megatron_r1.rewards.rules.format:FormatScorer",
    "language": "megatron_r1.rewards.language.scorer:LanguageScorer",
}
ACCURACY_SCORERS = {"math": "math", "code": "code"}  #: a prompt's domain -> the scorer of its accuracy
#: a prompt's template -> the format that its responses must have
FORMATS = {"r1_zero": "zero", "r1_chat": "chat", "r1_chat_think": "chat_opened"}
OPENINGS = {"r1_chat_think": f"{THINK_OPEN}\n"}  #: a prompt's template -> what it already holds of the response


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer to build in a worker process, and how long it may take over one response."""

    target: str  #: "module:class", from `SCORERS`
    time_limit_seconds: float  #: wall time of one `score` call, from the start of the work
    settings: Mapping[str, Any] = field(default_factory=dict)  #: keyword arguments of the class; must fit JSON
    opening: str = ""  #: set before every response: without it, reasoning that the prompt opened and nobody closed were an answer


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


def needed_scorers(config: RewardConfig, domains: Iterable[str]) -> list[str]:
    """The scorers that prompts of these domains need: a sandbox is not asked for where there is no code.

    Raises:
        RewardError: no accuracy is judged for a domain.
    """
    names = []
    for domain in sorted(domains):
        if domain not in ACCURACY_SCORERS:
            raise RewardError(f"no accuracy is judged for problems of domain {domain!r}; there are {', '.join(ACCURACY_SCORERS)}")
        names.append(ACCURACY_SCORERS[domain])
    return [*dict.fromkeys(names), "format", *(["language"] if config.language_weight else [])]


def scorer_specs(config: RewardConfig, names: Iterable[str], template: str) -> dict[str, ScorerSpec]:
    """The named scorers with the settings of a config.

    Args:
        template: of the prompts, one of `FORMATS`.

    Raises:
        RewardError: there is no such scorer, or the template has no format.
    """
    if template not in FORMATS:
        raise RewardError(f"data.template={template} has no format to reward; choose one of {', '.join(FORMATS)}")
    settings = {
        "math": {"answer_location": config.answer_location, "policy": config.math.model_dump()},
        "code": config.code.model_dump(),
        "format": {"template": FORMATS[template]},
        "language": {},
    }
    specs = {}
    for name in names:
        if name not in SCORERS:
            raise RewardError(f"no scorer {name!r}; there are {', '.join(SCORERS)}")
        limit = config.code_time_limit_seconds if name == "code" else config.time_limit_seconds
        opening = "" if name == "format" else OPENINGS.get(template, "")
        specs[name] = ScorerSpec(SCORERS[name], limit, settings[name], opening)
    return specs
