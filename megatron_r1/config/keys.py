"""The keys of all settings, as `grpo.optimizer.lr` names them, and what they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_r1.config.schema import Config
from megatron_r1.config.section import may_change


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section; None for a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        inner = section_class(field)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


FIELDS = dict(_walk(Config, ""))  #: key -> field, of sections and settings, in the order of the schema
SECTIONS = {key: inner for key, field in FIELDS.items() if (inner := section_class(field)) is not None}  #: key -> class
FREE_FORM = {key for key, field in FIELDS.items() if get_origin(field.annotation) is dict}  #: settings with keys of the user's own


def known_keys() -> dict[str, FieldInfo]:
    """Key -> field for every setting of the schema, in its order; sections themselves are left out."""
    return {key: field for key, field in FIELDS.items() if key not in SECTIONS}


def keys_that_may_change() -> frozenset[str]:
    """The settings that a run which goes on may have other values of: they do not change its result. See `section.MAY_CHANGE`."""
    return frozenset(key for key, field in known_keys().items() if may_change(field))


def is_within(key: str, sections: tuple[str, ...]) -> bool:
    """Whether a key is one of these sections or settings, or stands in one of these sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def nearest_key(key: str) -> str:
    """The known key most like `key`, wherever it stands: the last name counts most, the sections around it break ties."""

    def similarity(known: str) -> float:
        names = difflib.SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        paths = difflib.SequenceMatcher(None, key, known).ratio()
        return 2 * names + paths

    return max(FIELDS, key=similarity)
