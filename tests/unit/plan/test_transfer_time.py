from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.devices import DEVICES
from megatron_r1.plan.transfer_time import SentShards, TransferCosts, Way, shards_seconds, transfer_seconds
from megatron_r1.plan.work import model_work

V3, DENSE = model_work(PRESETS["671b"]), model_work(PRESETS["qwen2.5_7b"])
H100, COSTS = DEVICES["H100"], TransferCosts()


def test_gathered_by_hand() -> None:
    parts = transfer_seconds(V3, H100, way="gathered", trainers=512, engines=512, held=5e9)
    assert parts["names"] == V3.tensors * COSTS.gathered_tensor
    assert parts["travel"] == pytest.approx(V3.parameters * 2 / (50e9 * 0.65 * COSTS.gathered))
    assert parts["host"] == 5e9 / COSTS.host


def test_one_node_gathers_over_nvlink() -> None:
    near, far = (transfer_seconds(DENSE, H100, way="gathered", trainers=size, engines=size)["travel"] for size in (8, 16))
    assert near < far


@pytest.mark.parametrize("way", ["broadcast", "peers", "resharded"])
def test_half_the_bytes_take_less(way: Way) -> None:
    half, whole = (
        sum(transfer_seconds(V3, H100, way=way, trainers=256, engines=256, element=element).values()) for element in (1.0, 2.0)
    )
    assert half < whole


def test_pieces_that_ranks_send_each_other_are_fastest_for_a_large_model() -> None:
    found = {
        way: sum(transfer_seconds(V3, H100, way=way, trainers=256, engines=256).values())
        for way in ("resharded", "peers", "broadcast", "gathered")
    }  # type: dict[str, float]
    assert list(found) == sorted(found, key=lambda way: found[way])


SHARDS = SentShards(shard=21e9, sent=21e9, workers=8, far=0.5, through_host=True, verified=True, wakes=False)


def test_the_rank_that_feeds_a_node_is_the_slowest_through_the_host() -> None:
    parts = shards_seconds(V3, H100, SHARDS)
    assert parts["travel"] == pytest.approx(8 * 21e9 * 1.0002 * 0.5 / COSTS.tcp)
    assert parts["start"] == COSTS.start and shards_seconds(V3, H100, replace(SHARDS, wakes=True))["start"] > 1
    near = shards_seconds(V3, H100, replace(SHARDS, far=0.0))["travel"]
    assert near == pytest.approx(21e9 * 1.0002 * (2 / 25e9 + 1 / COSTS.hash)), "a worker reads its shard back to check it"
    plain = shards_seconds(V3, H100, replace(SHARDS, far=0.0, verified=False))["travel"]
    assert plain == pytest.approx(21e9 * 1.0002 / 25e9)


def test_over_nccl_the_network_of_the_feeding_rank_decides_or_what_a_trainer_sends() -> None:
    over = replace(SHARDS, through_host=False, far=1.0)
    link = H100.link_rate(True)
    assert shards_seconds(V3, H100, over)["travel"] == pytest.approx(8 * 21e9 * 1.0002 / link)
    few = replace(over, sent=400e9, verified=False)
    assert shards_seconds(V3, H100, few)["travel"] == pytest.approx(400e9 * 1.0002 / link)
