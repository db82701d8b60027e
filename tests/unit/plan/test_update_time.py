from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.devices import DEVICES
from megatron_r1.plan.layer_time import Grid, head_seconds
from megatron_r1.plan.update_time import TrainedBatch, Training, micro_batches, own_parameters, pass_seconds, update_seconds
from megatron_r1.plan.work import model_work

V3, DENSE = model_work(PRESETS["671b"]), model_work(PRESETS["qwen2.5_7b"])
H100 = DEVICES["H100"]
ROWS = TrainedBatch(64 * 4096.0, 2048.0, 4096.0)


def test_micro_batches_are_filled_evenly() -> None:
    assert micro_batches(ROWS, Grid(8), Training()) == (8, 4096.0)
    assert micro_batches(replace(ROWS, micro_batch=5000.0), Grid(8), Training()) == (7, pytest.approx(8 * 4096 / 7))


def test_copies_with_uneven_samples_wait_for_the_fullest() -> None:
    batch = TrainedBatch(512 * 1000.0, 500.0, 10_000.0, sequences=512, variation=0.8)
    even, _ = micro_batches(batch, Grid(32), Training())
    uneven, _ = micro_batches(batch, Grid(32), Training(even_ranks=False))
    assert (even, uneven) == (2, 3)


def test_a_pipeline_waits_for_its_stages_and_less_with_virtual_ones() -> None:
    plain = pass_seconds(V3, H100, Grid(64, pp=8, ep=8), ROWS, Training(), backward=True)
    one = sum(plain[part] for part in plain if part not in ("bubble", "pipeline")) / 8
    assert plain["bubble"] == pytest.approx(7 * one)
    virtual = pass_seconds(V3, H100, Grid(64, pp=8, vpp=4, ep=8), ROWS, Training(), backward=True)
    assert virtual["bubble"] == pytest.approx(7 / 4 * one)
    both = pass_seconds(V3, H100, Grid(64, pp=8, ep=8), ROWS, Training(dual_pipe=True), backward=True)
    assert both["bubble"] == pytest.approx(one)


def test_recomputation_and_mtp_cost_time() -> None:
    plain, again, mtp = (
        sum(update_seconds(V3, H100, Grid(64, pp=8, ep=8), ROWS, training).values())
        for training in (Training(), Training(recompute=1.0), Training(mtp=True))
    )
    assert 1.2 < again / plain < 1.4 and 1.01 < mtp / plain < 1.1


def test_log_probs_are_a_third_of_an_update() -> None:
    grid = Grid(8)
    forward = sum(pass_seconds(DENSE, H100, grid, ROWS, Training(), backward=False).values())
    assert sum(pass_seconds(DENSE, H100, grid, ROWS, Training(), backward=True).values()) / forward == pytest.approx(3, rel=0.05)


def test_logits_that_are_not_kept_are_computed_again() -> None:
    """4,096 tokens of 129,280 logits in bf16 are 1.06 GB: 265 MB on each of four ranks."""
    grid = Grid(8, tp=4)
    kept, tiled = (
        pass_seconds(V3, H100, grid, ROWS, Training(whole_logits=most * 1e6), backward=True)["products"] for most in (265, 264)
    )
    assert tiled - kept == pytest.approx(head_seconds(V3, H100, grid, 4096.0) * 32)
    for most in (1e9, 0.0):
        assert pass_seconds(V3, H100, grid, ROWS, Training(whole_logits=most), backward=False)["products"] == pytest.approx(
            pass_seconds(V3, H100, grid, ROWS, Training(), backward=False)["products"]
        )


def test_gradients_travel_by_hand() -> None:
    parts = update_seconds(DENSE, H100, Grid(16), ROWS, Training())
    assert parts["reduction"] == pytest.approx(DENSE.parameters * 6 * 15 / 16 / (50e9 * 0.65))
    assert update_seconds(DENSE, H100, Grid(16), ROWS, Training(overlapped_reduction=True))["reduction"] == 0
    assert update_seconds(DENSE, H100, Grid(8), ROWS, Training())["reduction"] < parts["reduction"] / 4  # over NVLink


def test_an_optimizer_on_the_host_takes_longer() -> None:
    near, far = (update_seconds(V3, H100, Grid(128, pp=16, ep=8), ROWS, Training(offloaded_optimizer=x)) for x in (0.0, 1.0))
    assert far["optimizer"] > 10 * near["optimizer"]


def test_weights_of_a_rank() -> None:
    experts = 58 * 256 * 44_040_192
    assert own_parameters(V3, Grid(512, tp=8, pp=16, ep=32)) == pytest.approx((experts / 32 + V3.unrouted / 8) / 16)
    assert own_parameters(DENSE, Grid(8)) == DENSE.parameters
