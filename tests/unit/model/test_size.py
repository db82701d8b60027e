"""Parameters by the formula are those that the models are known for."""

from __future__ import annotations

import pytest

from megatron_r1.model.presets import PRESETS
from megatron_r1.model.size import count_parameters
from megatron_r1.weights.mapping import model_entries


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("671b", 671_026_419_200 + 11_610_068_224),  # DeepSeek-V3, and its layer of multi-token prediction
        ("deepseek_v2_lite", 15_706_484_224),
        ("qwen2.5_0.5b", 494_032_768),  # these three: safetensors.total of the Hub's pages
        ("qwen2.5_1.5b", 1_543_714_304),
        ("qwen2.5_7b", 7_615_616_512),
        ("16b", 15_706_484_224 + 26 * 64),  # the same with V3's bias of every expert
    ],
)
def test_published_models(preset, parameters):
    assert count_parameters(PRESETS[preset]) == parameters


def test_the_formula_counts_what_the_table_of_weights_holds():
    for preset in ("tiny", "16b"):
        shapes = [entry.full_shape for entry in model_entries(PRESETS[preset])]
        assert count_parameters(PRESETS[preset]) == sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes)
