"""A layer's seconds against the same by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.devices import DEVICES
from megatron_r1.plan.layer_time import PARTS, Costs, Grid, LayerPass, backward_layer, forward_layer, head_seconds
from megatron_r1.plan.work import model_work

V3, DENSE = model_work(PRESETS["671b"]), model_work(PRESETS["qwen2.5_7b"])
H100, GB200 = DEVICES["H100"], DEVICES["GB200"]
ALONE = Grid(8)


def test_a_dense_layer_by_hand() -> None:
    parts = forward_layer(DENSE, H100, ALONE, LayerPass(10_000, 500), moe=False)
    assert set(parts) == set(PARTS)
    matrices = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944
    assert parts["products"] == pytest.approx(2 * 10_000 * matrices / (989.5e12 * 0.66))
    assert parts["attention"] == pytest.approx(2 * 28 * 256 * 500 * 10_000 / (989.5e12 * 0.48))
    assert parts["tensor"] == parts["dispatch"] == parts["experts"] == 0


def test_tensor_parallelism_cuts_products_and_costs_traffic() -> None:
    one = forward_layer(DENSE, H100, ALONE, LayerPass(10_000, 500), moe=False)
    four = forward_layer(DENSE, H100, Grid(8, tp=4), LayerPass(10_000, 500), moe=False)
    assert four["products"] == pytest.approx(one["products"] / 4)
    assert four["tensor"] == pytest.approx(4 * 10_000 * 3584 * 2 * 0.75 / (450e9 * 0.45))


def test_expert_traffic_by_hand() -> None:
    what = LayerPass(4096, 2048, balanced=True)
    near = forward_layer(V3, H100, Grid(64, ep=8), what, moe=True)["dispatch"]
    sent = 4096 * 7168 * 2 * 8
    assert near == pytest.approx(2 * sent * 7 / 8 / (450e9 * 0.45))
    far = forward_layer(V3, H100, Grid(64, ep=64), what, moe=True)["dispatch"]
    assert far == pytest.approx(2 * sent * (1 / 8 / (450e9 * 0.45) + 7 / 8 / (50e9 * 0.65)))
    once = forward_layer(V3, H100, Grid(64, ep=64), replace(what, deepep=True), moe=True)["dispatch"]
    assert once == pytest.approx(2 * 4096 * 7168 * 2 * 3 / (50e9 * 0.65))  # at most 4 nodes, its own among them
    assert forward_layer(V3, GB200, Grid(64, ep=64), what, moe=True)["dispatch"] < once  # one domain of 72


def test_ranks_that_share_an_expert_all_get_its_tokens() -> None:
    what = LayerPass(4096, 2048, balanced=True)
    shared = forward_layer(V3, H100, Grid(64, tp=8, etp=8), what, moe=True)["dispatch"]
    assert shared == pytest.approx(2 * 4096 / 8 * 7168 * 2 * 8 * 7 / (450e9 * 0.45))
    assert forward_layer(V3, H100, ALONE, what, moe=True)["dispatch"] == 0


def test_the_fullest_rank_decides_and_overlap_hides_traffic() -> None:
    grid, what = Grid(64, ep=8), LayerPass(4096, 2048)
    uneven, even = (forward_layer(V3, H100, grid, replace(what, balanced=balanced), moe=True) for balanced in (False, True))
    assert uneven["dispatch"] == pytest.approx(even["dispatch"] * Costs().imbalance)
    hidden = forward_layer(V3, H100, grid, replace(what, overlapped=True), moe=True)
    assert hidden["dispatch"] == pytest.approx(uneven["dispatch"] * (1 - Costs().hidden_dispatch))


def test_few_tokens_wait_for_the_host_unless_layers_are_captured() -> None:
    few = LayerPass(16, 8)
    parts = forward_layer(DENSE, H100, ALONE, few, moe=False)
    assert sum(parts.values()) == pytest.approx(Costs().launch)
    captured = forward_layer(DENSE, H100, ALONE, replace(few, graphs=True), moe=False)
    assert captured["launch"] < parts["launch"]


def test_backward_is_twice_the_products_and_recomputation_once_more() -> None:
    forward = forward_layer(V3, H100, Grid(64, ep=8), LayerPass(4096, 2048), moe=True)
    backward = backward_layer(forward)
    assert backward["products"] == 2 * forward["products"] and backward["attention"] == 2.5 * forward["attention"]
    again = backward_layer(forward, recompute=1.0)
    assert sum(again.values()) == pytest.approx(sum(backward.values()) + sum(forward.values()))


def test_fp8_products_are_faster_and_attention_is_not() -> None:
    plain, fp8 = (forward_layer(V3, H100, ALONE, LayerPass(4096, 2048, fp8=fp8), moe=True) for fp8 in (False, True))
    assert fp8["products"] < plain["products"] and fp8["attention"] == plain["attention"]


def test_the_output_layer_is_cut_by_tensor_parallelism() -> None:
    assert head_seconds(V3, H100, Grid(8, tp=8), 4096) == pytest.approx(head_seconds(V3, H100, ALONE, 4096) / 8)


def test_copies_of_a_layout() -> None:
    grid = Grid(512, tp=8, pp=16, ep=32)
    assert (grid.dp, grid.expert_dp) == (4, 1)
