"""A user's own reward: a Python function, run in the scoring processes like the built-in scorers. See docs/how_to/reward.md."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_r1.errors import ConfigError
from megatron_r1.import_path import import_function
from megatron_r1.rewards.protocol import Verdict

if TYPE_CHECKING:
    from megatron_r1.rewards.protocol import Asked

ARGUMENTS = ("prompt", "response", "reference")  #: what every function is called with, by position
CUT = "cut"  #: a further argument, by name: given to a function that has a parameter of this name
_RESULT_KEYS = {"score", "outcome", "detail"}
_DETAIL_CHARACTERS = 300


@dataclass(frozen=True)
class AskedPrompt:
    """What a function learns of the prompt: its first argument."""

    id: str  #: stable over runs
    question: str  #: the bare question, before the template
    domain: str  #: "math" or "code", or one of the user's own
    language: str  #: "en", "zh", or "" if unknown
    kind: str  #: "reasoning" or "general"


def custom_reference(asked: Asked, reference: Any, cut: bool = False) -> dict[str, Any]:
    """What `CustomScorer.score` takes as its reference; fits JSON.

    Args:
        reference: what the function is to get as the reference.
        cut: the response was cut at the length limit.
    """
    prompt = {name: getattr(asked, name) for name in AskedPrompt.__dataclass_fields__}
    return {"prompt": prompt, "reference": reference, "cut": cut}


class CustomScorer:
    """Calls the function, and makes a verdict of whatever it returns or raises. See `protocol.Scorer`.

    A response that was cut at the length limit scores 0 and costs no call, unless the function has a parameter `cut`.

    Args:
        name: of the reward in the settings.
        function: "package.module:function".
        settings: keyword arguments of the function.
        json_reference: the function gets the reference parsed from JSON.

    Raises:
        ConfigError: there is no such function, or it cannot be called with these arguments.
    """

    def __init__(self, name: str, function: str, settings: Mapping[str, Any], json_reference: bool) -> None:
        self.name = name
        self._settings, self._json_reference = dict(settings), json_reference
        key = f"reward.custom.{name}.function"
        self._function = import_function(function, key, ARGUMENTS, named=tuple(settings), optional=(CUT,))
        if inspect.isclass(self._function) or inspect.iscoroutinefunction(self._function):
            what = "a class" if inspect.isclass(self._function) else "an async function"
            raise ConfigError(f"{key}={function} is {what}: name a plain function that returns the score")
        self._takes_cut = CUT in inspect.signature(self._function).parameters
        self._has_failed = False

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`; the reference is one of `custom_reference`."""
        if reference["cut"] and not self._takes_cut:
            return Verdict(0.0, "wrong", "cut at the length limit")
        answer = reference["reference"]
        if self._json_reference and isinstance(answer, str):
            try:
                answer = json.loads(answer)
            except (ValueError, RecursionError):
                return Verdict(None, "unscorable", "the reference is not JSON")
        named = self._settings | ({CUT: reference["cut"]} if self._takes_cut else {})
        try:
            return verdict_of(self._function(AskedPrompt(**reference["prompt"]), response, answer, **named))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything: that is the outcome "error"
            if not self._has_failed:
                traceback.print_exc(file=sys.stderr)  # once in each worker, into the log of the scoring processes
                sys.stderr.flush()
            self._has_failed = True
            return Verdict(None, "error", _line(f"{type(error).__name__}: {error}"))


def verdict_of(result: Any) -> Verdict:
    """The verdict that a function's result stands for.

    A number is the score: "correct" from 1, "wrong" below. A dict has `score`, and may have
    `outcome` and `detail`. A `Verdict` is kept.

    Raises:
        TypeError: the result is none of these.
        ValueError: the score is not finite, does not fit the outcome, or the outcome is unknown.
    """
    if isinstance(result, Verdict):
        json.dumps(result.parts)  # raises TypeError for what cannot leave the scoring process
        return Verdict(
            None if result.score is None else _as_float(result.score), result.outcome, _line(result.detail), result.parts
        )
    if isinstance(result, Mapping):
        unknown = sorted(map(str, set(result) - _RESULT_KEYS))
        if unknown or "score" not in result:
            found = ", ".join(map(str, result)) or "none"
            raise ValueError(f"a dict has score and may have outcome and detail, this one has {found}")
        score = None if result["score"] is None else _as_float(result["score"])
        outcome = result.get("outcome", "unscorable" if score is None else _outcome_of(score))
        return Verdict(score, outcome, _line(result.get("detail", "")))
    score = _as_float(result)
    return Verdict(score, _outcome_of(score))


def _as_float(value: Any) -> float:
    """Also numbers of numpy and tensors of one element."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"the function returned {type(value).__name__}, expected a number, a dict with a score, or a Verdict")
    return float(value)


def _line(text: Any) -> str:
    return " ".join(str(text).split())[:_DETAIL_CHARACTERS]


def _outcome_of(score: float) -> str:
    return "correct" if score >= 1.0 else "wrong"
