"""A model's work in plain numbers is what the counts of parameters and of FLOPs say."""

from __future__ import annotations

import pytest

from megatron_r1.model.flops import forward_flops, rows_of
from megatron_r1.model.presets import PRESETS
from megatron_r1.model.size import count_parameters
from megatron_r1.plan.work import model_work


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_parameters_and_flops_are_the_models(preset: str) -> None:
    arch = PRESETS[preset]
    work = model_work(arch)
    mtp = sum(
        (arch.experts.count if row.is_expert and arch.experts else 1)
        * sum(shape[0] * shape[1] for shape in row.shapes if len(shape) == 2)
        for block in arch.mtp_blocks() for row in block.rows
    )  # fmt: skip
    vectors = sum(sum(s[0] for s in row.shapes if len(s) == 1) for block in arch.blocks() for row in block.rows)
    assert work.parameters == count_parameters(arch) - mtp - vectors
    tokens = 64
    flops = forward_flops(arch, rows_of(1, tokens))
    assert tokens * work.token_flops((tokens + 1) / 2) == pytest.approx(flops, rel=1e-12)


def test_v3_decodes_on_its_compressed_rows() -> None:
    work = model_work(PRESETS["671b"])
    assert (work.layers, work.moe_layers, work.experts, work.per_token, work.mtp) == (61, 58, 256, 8, 1)
    assert (work.cached, work.cache_shares, work.expert_groups) == (576, 1, 4)
    assert work.absorbed_pair_flops == 2 * 128 * (576 + 512)
    assert work.active == pytest.approx(36.6e9, rel=2e-3)  # V3's README_WEIGHTS: 36.7B without the embedding


def test_heads_share_the_cache_of_grouped_queries() -> None:
    work = model_work(PRESETS["qwen2.5_7b"])
    assert (work.cached, work.cache_shares) == (2 * 4 * 128, 4)
    assert work.absorbed_pair_flops == work.pair_flops
