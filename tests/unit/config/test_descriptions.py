"""Every setting explains itself in whole sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import get_annotations
from types import UnionType
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_r1.config.keys import known_keys
from megatron_r1.config.schema import Config

FEWEST_WORDS = 6
FRAGMENT = re.compile(r"(?i)(of (them|it|one test|a response)|(the paper does )?not state(d| it)|ours|default)\W*")


def leaves(section: type[BaseModel] = Config) -> Iterator[tuple[str, FieldInfo]]:
    """(class that defines it and name, field) of all settings, those of entries of a list included."""
    for name, field in section.model_fields.items():
        inner = [
            part
            for part in (field.annotation, *get_args(field.annotation))
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        if not inner or get_origin(field.annotation) in (list, UnionType):
            definer = next(c for c in section.__mro__ if name in get_annotations(c))
            yield f"{definer.__name__}.{name}", field
        for part in inner:
            yield from leaves(part)


LEAVES = dict(leaves())


@pytest.mark.parametrize("name", LEAVES)
def test_every_setting_is_described_in_sentences(name):
    assert complaint(LEAVES[name].description) is None


def complaint(description: str | None) -> str | None:
    """What is wrong with a description; None: nothing."""
    if not description or len(description.split()) < FEWEST_WORDS:
        return f"has fewer than {FEWEST_WORDS} words"
    first = description.partition(". ")[0]
    if FRAGMENT.fullmatch(first):
        return f"begins with a fragment: {first}"
    if not description[0].isupper():
        return "does not begin with a capital letter"
    if not description.endswith("."):
        return "does not end with a full stop"
    return None


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "of them",
        "Sampling temperature of the judge",
        "sampling temperature of the judge in a vote.",
        "Not stated. The paper says no more than this of it.",
        "Of them. The number of all that are measured here.",
    ],
)
def test_what_is_no_description_would_be_found(bad):
    assert complaint(bad) is not None


def test_no_two_settings_have_the_same_description():
    seen: dict[str, str] = {}
    for name, field in LEAVES.items():
        assert field.description is not None
        assert seen.setdefault(field.description, name) == name, f"{name} and {seen[field.description]} have the same description"


def test_every_key_is_looked_at():
    assert {field.description for field in known_keys().values()} <= {field.description for field in LEAVES.values()}


def test_the_paper_is_cited_by_version():
    """Neither vLLM's V1 engine nor DeepSeek-V2 is meant."""
    for name, field in LEAVES.items():
        assert not re.search(r"(?<!R1 )(?<!/)\bv[12]\b", field.description or ""), name


def test_every_benchmark_and_filter_is_named_where_it_is_chosen():
    from megatron_r1.curation.filters import FILTERS
    from megatron_r1.evaluation.benchmarks import BENCHMARKS

    for name in BENCHMARKS:
        assert name in LEAVES["BenchmarksConfig.files"].description
    for name in FILTERS:
        assert name in LEAVES["FilterConfig.names"].description
