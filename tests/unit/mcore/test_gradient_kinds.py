"""Norms of the gradient by kind of parameter are parts of the whole norm, and every parameter is of a kind."""

from __future__ import annotations

import math

import pytest

from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.registry import families
from megatron_r1.weights.mapping import model_entries
from tests.balance_cases import build_model, one_update
from tests.one_rank import one_rank_world

host.activate("cpu")

from megatron_r1.mcore.gradient_kinds import KINDS, kind_of


def squares(got: dict) -> float:
    return sum(value**2 for name, value in got.items() if name.startswith("grad_norm/"))


def test_the_squares_of_a_model_with_everything_add_up() -> None:
    one_rank_world()
    got = one_update("sft", build_model("sft", micro_batch_tokens=200))
    assert {name.partition("/")[2] for name in got if name.startswith("grad_norm/")} == set(KINDS.values())
    mtp = got["grad_norm/mtp"]  # it trains its head alone here, and is no part of the whole norm
    assert mtp == 0.0 and math.isclose(squares(got), got["grad_norm"] ** 2, rel_tol=1e-5)


def test_every_parameter_of_every_family_is_of_a_kind() -> None:
    for family in families().values():
        for name, arch in family.presets.items():
            if name.startswith("tiny"):
                kinds = {kind_of(spelling) for spelling in names_of(arch)}
                assert {"embedding", "norms", "attention"} <= kinds and ("experts" in kinds) == (arch.experts is not None)
    with pytest.raises(ValueError, match="parameter decoder.layers.0.new.weight is of no kind"):
        kind_of("decoder.layers.0.new.weight")


def names_of(arch: Architecture) -> list[str]:
    return [spelling for entry in model_entries(arch) for spelling in entry.megatron]
