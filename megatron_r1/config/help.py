"""What the command line says about settings: those of a command, one of them, a section."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_r1.config.keys import FIELDS, FREE_FORM, SECTIONS, is_within, known_keys, nearest_key
from megatron_r1.config.load import flatten_config
from megatron_r1.config.resume import kind_on_resume, reason_to_stay
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError

_WIDTH = 100
#: how descriptions cite a paper -> which it is
_PAPERS = {
    "R1 v1": "DeepSeek-R1, arXiv 2501.12948v1",
    "R1 v2": "DeepSeek-R1, arXiv 2501.12948v2",
    "V3": "DeepSeek-V3, arXiv 2412.19437",
    "DeepSeekMath": "arXiv 2402.03300",
}
_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "any value"}
_BOUNDS = {annotated_types.Gt: "above", annotated_types.Ge: "at least", annotated_types.Lt: "below", annotated_types.Le: "at most"}


def describe_settings(sections: Sequence[str]) -> str:
    """Every setting of these sections, section by section, with its default and its whole description."""
    defaults, lines = flatten_config(Config()), ["settings and their defaults:"]
    for section in sections:
        for key, field in known_keys().items():
            if is_within(key, (section,)):
                lines += [f"  {key}={_as_yaml(defaults[key])}", *_wrap(_describe_with_choices(field), 6)]
    papers = "; ".join(_cited_papers("\n".join(lines)))
    return "\n".join([*lines, *(["", *_wrap(f"papers: {papers}", 0)] if papers else [])])


def count_settings(sections: Sequence[str]) -> int:
    """The number of settings of these sections."""
    return sum(is_within(key, tuple(sections)) for key in known_keys())


def explain(key: str, readers: Mapping[str, Sequence[str]]) -> str:
    """What a setting is, or which settings a section has.

    Args:
        key: of a setting, of a section, or of an entry below a setting that takes keys of the user's own.
        readers: name of a command -> the sections and settings that the command reads.

    Raises:
        ConfigError: an unknown key; names the nearest known one.
    """
    key = next((free for free in FREE_FORM if key.startswith(f"{free}.")), key)
    if key not in FIELDS:
        raise ConfigError(f"unknown key '{key}'; the nearest known key is '{nearest_key(key)}'")
    return _explain_section(key) if key in SECTIONS else _explain_setting(key, readers)


def list_sections() -> str:
    """The sections and the settings that stand in none, each with its first sentence."""
    return "\n".join(_list_fields(Config, ""))


def _explain_section(key: str) -> str:
    return "\n".join([key, *_wrap(_summary_of(SECTIONS[key]), 2), "", *_list_fields(SECTIONS[key], f"{key}.")])


def _explain_setting(key: str, readers: Mapping[str, Sequence[str]]) -> str:
    field = FIELDS[key]
    names = [name for name, sections in readers.items() if is_within(key, tuple(sections))]
    facts = {
        "type": _describe_type(field),
        "default": _as_yaml(flatten_config(Config())[key]),
        "on resume": _describe_resume(key),
        "read by": ", ".join(names) or "no command",
    }
    if papers := "; ".join(_cited_papers(field.description or "")):
        facts["papers"] = papers
    lines = [key, *_wrap(field.description or "", 2), ""]
    for name, fact in facts.items():
        lines += textwrap.wrap(fact, _WIDTH, initial_indent=f"  {name + ':':<11}", subsequent_indent=" " * 13)
    entry = _entry_class(field.annotation)
    if entry is not None:
        lines += ["", "  an entry has:", *(f"  {line}" for line in _list_fields(entry, ""))]
    return "\n".join(lines)


def _describe_resume(key: str) -> str:
    reason = reason_to_stay(key)
    return {
        "free": "may change",
        "moves": "may be another path; its content must stay as it was",
        "longer": "may change to train longer",
        "onward": "may change for the rounds or updates that follow",
        "stays": f"must stay as it was{f': {reason}' if reason else ''}",
    }[kind_on_resume(key)]


def _cited_papers(text: str) -> list[str]:
    return [f"{name} is {paper}" for name, paper in _PAPERS.items() if re.search(rf"(?<!-)\b{name}\b", text)]


def _list_fields(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = SECTIONS.get(f"{prefix}{name}")
        text = _first_sentence(field.description or "") if inner is None else f"Section: {_summary_of(inner)}"
        yield f"  {prefix}{name}"
        yield from _wrap(text, 6)


def _summary_of(section: type[BaseModel]) -> str:
    return _first_sentence(" ".join((inspect.getdoc(section) or "").split()))


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=(?<!e\.g)\.) ", text, maxsplit=1)[0]


def _describe_with_choices(field: FieldInfo) -> str:
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    return f"{field.description} One of {', '.join(choices)}." if choices else field.description or ""


def _describe_type(field: FieldInfo) -> str:
    """The type in words, with its choices and bounds, e.g. "number above 0 and at most 1, or null"."""
    kinds = get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    bounds = " and ".join(_describe_bounds(field.metadata))
    named = " or ".join(_name_type(kind) for kind in kinds if kind is not NoneType) + (f" {bounds}" if bounds else "")
    return f"{named}, or null" if NoneType in kinds else named


def _describe_bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for constraint in metadata:
        word = _BOUNDS.get(type(constraint))
        if word is not None:
            yield f"{word} {getattr(constraint, type(constraint).__name__.lower()):g}"
        elif isinstance(constraint, annotated_types.MinLen):
            yield "that is not empty"


def _name_type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = list(_describe_bounds(m for part in arguments[1:] for m in getattr(part, "metadata", [part])))
        return " ".join([_name_type(arguments[0]), *bounds])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"list whose entries are: {_name_type(arguments[0])}"
    if origin is dict:
        return f"mapping whose values are: {_name_type(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "{" + ", ".join(kind.model_fields) + "}"
    return _NAMES[kind]


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _entry_class(kind: Any) -> type[BaseModel] | None:
    """The class of a setting's entries, e.g. of the list `sft.sources`."""
    classes = (part for part in get_args(kind) if isinstance(part, type) and issubclass(part, BaseModel))
    return next(classes, None)


def _as_yaml(value: object) -> str:
    """As the value may stand on the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _wrap(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
