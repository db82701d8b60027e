"""One problem from a record: of this project's own fields, or of the forms that TRL, verl and open-r1 publish.

    {"question", "answer", ...}                                      this project's
    {"prompt": messages, "reward_model": {"ground_truth", "style"},
     "ability", "data_source", "extra_info"}                         verl's
    {"prompt": messages or text, "solution" ...}                     TRL's
    {"problem", "solution", "answer", "messages"}                    open-r1's
    MBPP, HumanEval, APPS                                            see `coding_records`

"system" goes before the question, wherever that stands. Pictures and tools are refused: nothing here takes them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.conversations import read_asked, with_system
from megatron_r1.data.chat.messages import Message, read_tools, refuse_media
from megatron_r1.data.coding_records import with_tests
from megatron_r1.data.record_files import is_missing, take_text
from megatron_r1.errors import DataError
from megatron_r1.types import DOMAINS, KINDS, PREFERENCES

_OTHER_DOMAIN = ", or name the scorer of this domain in reward.domains"
#: where a question and an answer stand if not in the fields that the config names by default
_QUESTIONS = ("problem", "prompt", "messages")
_ANSWERS = ("reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer", "solution")
_ABILITIES = {"math": "math", "code": "code", "coding": "code"}  # verl's


@dataclass(frozen=True)
class Problem:
    """A question and its reference answer."""

    id: str  #: stable over runs
    question: str
    answer: str  #: in the form that the reward function takes
    language: str = ""  #: "en", "zh", or "" if unknown
    domain: str = "math"  #: the subject, which names the scorer of accuracy; the answer of "code" is its tests as JSON
    kind: str = "reasoning"  #: "reasoning" or "general"
    preference: str = "helpful"  #: of a general problem: "helpful" or "safety"
    #: file and line; "" if the problem is of no file. Out of the text of a problem, since a cold start's digest is of that text
    where: str = field(default="", compare=False, repr=False)
    context: tuple[Message, ...] = field(default=(), repr=False)  #: what was said before the question


def read_problem(record: dict[str, Any], config: DataConfig, domains: Collection[str], where: str, id: str) -> Problem:
    """The problem of one record.

    Raises:
        DataError: what is missing or malformed, after `where`.
    """
    record = with_tests(record)
    *context, asked = take_asked(record, config, where)
    kind = _take_choice(record, "kind", KINDS, "reasoning", where)
    preference = _take_choice(record, "preference", PREFERENCES, "helpful", where)
    domain = _take_choice(record, "domain", domains, _default_domain(record), where, _OTHER_DOMAIN)
    language = take_text(record, "language", where) if _has(record, "language") else ""
    answer = _take_answer(record, config, kind, domain, where)
    return Problem(id, asked.content, answer, language, domain, kind, preference, where, tuple(context))


def _has(record: dict[str, Any], field: str) -> bool:
    return not is_missing(record.get(field)) and record[field] not in ("", [], {})


def _find(record: dict[str, Any], field: str) -> Any:
    """The value of a field, or of a field inside of an object ("a.b"); None if it is missing."""
    if field in record:
        return None if is_missing(record[field]) else record[field]
    outer, dot, inner = field.partition(".")
    value = record.get(outer)
    return _find(value, inner) if dot and isinstance(value, dict) else None


def take_asked(record: dict[str, Any], config: DataConfig, where: str) -> list[Message]:
    """The messages of the prompt; the last is the user's."""
    refuse_media(record, where)
    if read_tools(record, where):
        raise DataError(f"{where}: the record has tools, which no rollout calls; leave the problem out")
    field = config.question_field
    if _find(record, field) is None and field == DataConfig.model_fields["question_field"].default:
        field = next((name for name in _QUESTIONS if _has(record, name)), field)
    value = _find(record, field)
    messages = with_system(record, read_asked(record if value is None else {field: value}, field, where), where)
    if any(message.tool_calls or message.role == "tool" for message in messages):
        raise DataError(f"{where}: field {field!r} has calls of tools, which no rollout makes; leave the problem out")
    if not messages or messages[-1].role != "user":
        raise DataError(f"{where}: field {field!r} does not end with a message of the user, which is to be answered")
    return messages


def _default_domain(record: dict[str, Any]) -> str:
    """The domain of a record that names none: of the form of its reference, or verl's ability."""
    if _has(record, "tests"):
        return "code"
    ability = record.get("ability")
    if isinstance(record.get("reward_model"), dict) and isinstance(ability, str) and ability.strip():
        return _ABILITIES.get(ability.strip().casefold(), ability.strip())
    return "math"


def _take_choice(
    record: dict[str, Any], field: str, choices: Collection[str], default: str, where: str, otherwise: str = ""
) -> str:
    value = take_text(record, field, where) if not is_missing(record.get(field)) else default
    if value not in choices:
        raise DataError(f"{where}: {field} {value!r} is unknown; choose one of {', '.join(choices)}{otherwise}")
    return value


def _take_answer(record: dict[str, Any], config: DataConfig, kind: str, domain: str, where: str) -> str:
    """The reference as text: tests, and the objects and lists of further domains, as JSON. A general problem may have none."""
    field = config.answer_field
    value = _find(record, field)
    if value is None and field == DataConfig.model_fields["answer_field"].default:
        field = next((name for name in _ANSWERS if _find(record, name) is not None), field)
        value = _find(record, field)
    if kind == "general":
        return take_text({field: value}, field, where) if value not in (None, "") else ""
    _check_style(record, where)
    if domain == "code" or (domain not in DOMAINS and _has(record, "tests")):
        tests = record["tests"] if _has(record, "tests") else _find(record, "reward_model.ground_truth")
        if not tests:
            raise DataError(f"{where}: a problem of domain {domain} needs the field 'tests'")
        return tests if isinstance(tests, str) and _is_json_object(tests) else json.dumps(tests)
    if domain not in DOMAINS and isinstance(value, (dict, list)):
        return json.dumps(value)
    if field == _ANSWERS[0] and isinstance(value, list) and len(value) == 1:  # verl's may be a list
        value = value[0]
    answer = take_text(record if value is None else {field: value}, field, where)
    return _gsm8k_answer(answer, where) if config.answer_format == "gsm8k" else answer


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_style(record: dict[str, Any], where: str) -> None:
    """Raises DataError for a reference that verl gives to a model to judge, not to a rule."""
    style = _find(record, "reward_model.style")
    if isinstance(style, str) and not style.startswith("rule"):
        raise DataError(
            f"{where}: reward_model.style is {style!r}: a problem with a reference is scored by rule here; without one its kind is "
            "'general'"
        )


def _gsm8k_answer(solution: str, where: str) -> str:
    _, marker, answer = solution.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not marker or not answer:
        raise DataError(f"{where}: data.answer_format=gsm8k needs '#### ANSWER' at the end of the answer")
    return answer
