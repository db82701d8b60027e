"""Hugging Face to Megatron to Hugging Face is bit-exact in both dtypes under every layout, on every rank."""

from __future__ import annotations

import pytest

from tests.weights_runs import DTYPES, LAYOUTS, case_name, run_layouts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("world_size", "model", "sizes"),
    [(n, model, sizes) for n, models in LAYOUTS.items() for model, layouts in models.items() for sizes in layouts],
    ids=str,
)
def test_round_trip_is_exact(world_size: int, model: str, sizes: dict[str, int], dtype: str) -> None:
    problems, _ = run_layouts(world_size)
    assert problems[case_name(model, dtype, sizes)] == []
