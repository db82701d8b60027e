"""The scorers by name, which of them a run needs, and how a worker builds one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron_r1.errors import R1Error, RewardError
from megatron_r1.rewards.custom import custom_reference
from megatron_r1.rewards.protocol import Asked, Scorer
from megatron_r1.tags import THINK_OPEN

if TYPE_CHECKING:
    from megatron_r1.config.rewards import CustomRewardConfig, RewardConfig

#: the built-in scorers: name -> "module:class"; imported only when the scorer is built
SCORERS = {
    "math": "megatron_r1.rewards.math.scorer:MathScorer",
    "code": "megatron_r1.rewards.code.scorer:CodeScorer",
    "format": "megatron_r1.rewards.rules.format:FormatScorer",
    "choice": "megatron_r1.rewards.rules.choice:ChoiceScorer",
    "language": "megatron_r1.rewards.language.scorer:LanguageScorer",
}
CUSTOM_TARGET = "megatron_r1.rewards.custom:CustomScorer"  #: the scorer that calls a user's function
JSON_REFERENCES = frozenset({"code"})  #: scorers whose reference is the parsed JSON of a problem's answer
#: a problem's domain -> the scorer of its accuracy; `reward.domains` adds to these
ACCURACY_SCORERS = {"math": "math", "code": "code", "choice": "choice"}
#: a prompt's template -> the format that its responses must have, unless `reward.format` says which
FORMATS: Mapping[str, Literal["zero", "chat", "none"]] = {
    "r1_zero": "zero", "r1_chat": "chat", "r1_chat_think": "chat", "tokenizer": "none",
}  # fmt: skip
OPENINGS = {"r1_chat_think": f"{THINK_OPEN}\n"}  #: a prompt's template -> what it already holds of the response


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer to build in a worker process, and how long it may take over one response."""

    target: str  #: "module:class", from `SCORERS`
    time_limit_seconds: float  #: wall time of one `score` call, from its start
    settings: Mapping[str, Any] = field(default_factory=dict)  #: keyword arguments of the class; must fit JSON
    #: put before every response: else reasoning that the prompt opened and the response never closed would pass for an answer
    opening: str = ""


def build_scorer(target: str, settings: Mapping[str, Any]) -> Scorer:
    """Import and build one scorer.

    Raises:
        R1Error: it cannot be built here; the message is one line.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(**settings)
    except R1Error:
        raise
    except Exception as error:  # whatever a library raises at import, the user gets one line
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RewardError(f"the scorer {target} cannot be built: {reason}") from error


def accuracy_scorers(config: RewardConfig) -> dict[str, str]:
    """Domain -> the scorer of its accuracy, built in or custom."""
    return ACCURACY_SCORERS | config.domains


def accuracy_scorer(config: RewardConfig, asked: Asked) -> str:
    """The scorer of a problem's accuracy.

    Raises:
        RewardError: none is set for its domain.
    """
    scorer = accuracy_scorers(config).get(asked.domain)
    if scorer is None:
        raise RewardError(f"problem {asked.id!r} is of domain {asked.domain!r}; {_known_domains(config)}")
    return scorer


def accuracy_reference(config: RewardConfig, scorer: str, asked: Asked, cut: bool = False) -> Any:
    """A problem's answer as the scorer of its accuracy takes it.

    Args:
        cut: the response was cut at the length limit.
    """
    if is_custom(config, scorer):
        return custom_reference(asked, asked.answer, cut)
    if scorer not in JSON_REFERENCES:
        return asked.answer
    try:
        return json.loads(asked.answer)
    except (ValueError, RecursionError):
        return None  # the scorer calls a reference unscorable that it cannot use


def is_custom(config: RewardConfig, scorer: str) -> bool:
    """Whether a scorer calls a user's function."""
    return any(custom.name == scorer for custom in config.custom)


def custom_components(config: RewardConfig, kind: str) -> list[CustomRewardConfig]:
    """The custom rewards that are components of their own for prompts of this kind: not those that score a domain's accuracy."""
    accuracy = set(config.domains.values())
    return [custom for custom in config.custom if custom.name not in accuracy and custom.prompts in ("all", kind)]


def needed_scorers(config: RewardConfig, domains: Iterable[str]) -> list[str]:
    """The scorers that prompts of these domains need: no sandbox is asked for if there is no code.

    Raises:
        RewardError: no scorer is set for a domain.
    """
    known, names = accuracy_scorers(config), []
    for domain in sorted(domains):
        if domain not in known:
            raise RewardError(f"there are problems of domain {domain!r}; {_known_domains(config)}")
        names.append(known[domain])
    names += [*(["format"] if config.format != "none" else []), *(["language"] if config.language_weight else [])]
    names += [custom.name for kind in ("reasoning", "general") for custom in custom_components(config, kind)]
    return list(dict.fromkeys(names))


def with_format(config: RewardConfig, template: str) -> RewardConfig:
    """The rewards with the format that they want: `reward.format`, or that of the template."""
    return config if config.format is not None else config.model_copy(update={"format": FORMATS[template]})


def scorer_specs(config: RewardConfig, names: Iterable[str], template: str, opening: str | None = None) -> dict[str, ScorerSpec]:
    """The named scorers with the settings of a config.

    Args:
        template: of the prompts, one of `FORMATS`.
        opening: what every prompt already holds of its response; None: as the template has it in `OPENINGS`.

    Raises:
        RewardError: there is no such scorer, or no format to reward.
    """
    form = with_format(config, template).format
    settings: dict[str, dict[str, Any]] = {
        "math": {"answer_location": config.answer_location, "policy": config.math.model_dump()},
        "code": config.code.model_dump(),
        "language": config.language.model_dump(),
        "format": {"form": form, "pattern": config.format_pattern},
    }
    customs = {custom.name: custom for custom in config.custom}
    before = OPENINGS.get(template, "") if opening is None else opening
    specs = {}
    for name in names:
        if name in customs:
            specs[name] = _custom_spec(config, customs[name], before)
            continue
        if name not in SCORERS:
            raise RewardError(f"no scorer {name!r}; there are {', '.join((*SCORERS, *customs))}")
        if name == "format" and form == "none":
            said = f"data.template={template} has" if config.format is None else "reward.format=none leaves"
            raise RewardError(f"{said} no format to reward: set reward.format to zero, chat or custom")
        limit = config.code_time_limit_seconds if name == "code" else config.time_limit_seconds
        specs[name] = ScorerSpec(SCORERS[name], limit, settings.get(name, {}), before)
    return specs


def _custom_spec(config: RewardConfig, custom: CustomRewardConfig, opening: str) -> ScorerSpec:
    limit = custom.time_limit_seconds or config.time_limit_seconds
    return ScorerSpec(CUSTOM_TARGET, limit, custom.model_dump(include={"name", "function", "settings", "json_reference"}), opening)


def _known_domains(config: RewardConfig) -> str:
    known = ", ".join(accuracy_scorers(config))
    return f"accuracy is scored for {known}: correct the domain, or set reward.domains.DOMAIN=SCORER"
