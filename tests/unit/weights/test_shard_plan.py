"""Every element of what every engine rank holds comes exactly once from a rank that has it, under every pair of layouts."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import pytest
import torch

from megatron_r1.errors import WeightSyncError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import PRESETS
from megatron_r1.model.rows import Split
from megatron_r1.weights.boxes import intersect, slices_within, volume
from megatron_r1.weights.mapping import model_entries
from megatron_r1.weights.shard_plan import CHECKSUM_BYTES, FeedPlan, StoredWeights, check_names, cover, plan_feed
from megatron_r1.weights.trainer_shards import RankShards, TrainerHolders
from tests.engine_layouts import engine_boxes, engine_entries
from tests.random_weights import full_architecture, qwen2_architecture

TRAINERS = [
    {}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"ep": 2}, {"ep": 4}, {"tp": 2, "ep": 2}, {"tp": 2, "ep": 4}, {"tp": 4, "ep": 2, "etp": 2},
    {"ep": 2, "etp": 2}, {"tp": 2, "pp": 2, "ep": 2, "etp": 2}, {"dp": 2}, {"tp": 2, "pp": 4, "ep": 8, "dp": 4},
]  # fmt: skip
ENGINES = [
    {}, {"tp": 2}, {"tp": 4}, {"dp": 2}, {"dp": 2, "expert_parallel": True}, {"tp": 2, "expert_parallel": True},
    {"tp": 2, "dp": 2, "expert_parallel": True}, {"tp": 2, "dp": 2},
]  # fmt: skip


def described(arch: Architecture, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, dp: int = 1) -> list[RankShards]:
    """What each rank of a trainer holds: the ranks of a stage number tensor parallelism first, as Megatron-Core does."""
    entries, layers = model_entries(arch), arch.num_hidden_layers
    of_stage = math.lcm(tp * dp, ep * etp)
    held: list[list[list[int]]] = [[[] for _ in range(ep)] for _ in range(pp)]  # stage -> rank among experts -> entries
    for i, entry in enumerate(entries):
        owners = range(ep) if entry.expert is None else [entry.expert * ep // arch.experts.count]
        for owner in owners:
            held[_stage(entry, layers, pp)][owner].append(i)
    runs = [[_runs(entries, own) for own in of_experts] for of_experts in held]
    rows = [-(-arch.vocab_size // tp) if any(entries[i].split is Split.VOCAB for i in of[0]) else 0 for of in held]
    return [
        RankShards((rank % tp, tp), (rank % etp, etp), runs[stage][rank // etp % ep], rows[stage])
        for stage in range(pp)
        for rank in range(of_stage)
    ]


def _runs(entries, own: list[int]) -> tuple[tuple[int, int, torch.dtype], ...]:
    found: list[tuple[int, int, torch.dtype]] = []
    for i in own:
        dtype = torch.float32 if "expert_bias" in entries[i].megatron[0] else torch.bfloat16
        joins = bool(found) and found[-1][1:] == (i, dtype)
        found[-1:] = [(found[-1][0], i + 1, dtype)] if joins else [*found[-1:], (i, i + 1, dtype)]
    return tuple(found)


def _stage(entry, layers: int, pp: int) -> int:
    found = re.search(r"^model\.layers\.(\d+)", entry.hf[0])
    if found:
        return min(int(found[1]), layers - 1) * pp // layers
    return 0 if "embed" in entry.hf[0] else pp - 1


def check_exact(plan: FeedPlan, workers, holders: TrainerHolders, ranks: list[RankShards]) -> None:
    """Each worker's elements once, all pieces inside what their source holds, and no bytes of a bucket used twice."""
    counts = [[np.zeros([stop - start for start, stop in box], np.int8) for _, box in worker] for worker in workers]
    for worker, buckets in enumerate(plan.taken[0]):
        for number, pieces in enumerate(buckets):
            for piece in pieces:
                counts[worker][piece.index][slices_within(piece.box, workers[worker][piece.index][1])] += 1
                assert piece.offset + volume(piece.box) * piece.dtype.itemsize <= plan.buckets[number].size
    assert all((count == 1).all() for of_worker in counts for count in of_worker)
    for bucket in plan.buckets:
        used = np.zeros(bucket.size, np.int8)
        for part in bucket.parts:
            assert part.stop <= bucket.size
            for piece in part.pieces:
                own = holders.boxes(piece.name)
                assert any(part.source in ids and intersect(piece.box, box) == piece.box for box, ids in own), piece
                size = volume(piece.box) * piece.dtype.itemsize
                for start, length in ((piece.offset, size), (piece.checksum_at, CHECKSUM_BYTES)):
                    used[part.start + start : part.start + start + length] += 1
        assert used.max() == 1
    assert len(ranks) > max(part.source for bucket in plan.buckets for part in bucket.parts)


@pytest.mark.parametrize("trainer", TRAINERS, ids=str)
@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_every_element_comes_once_under_every_pair_of_layouts(name, trainer):
    arch = full_architecture() if name == "v3" else qwen2_architecture(tied=False)
    if name == "qwen2" and (trainer.get("ep") or trainer.get("tp") == 4):
        trainer = {key: min(size, 2) for key, size in trainer.items() if key not in ("ep", "etp")}
    ranks = described(arch, **trainer)
    holders = TrainerHolders(arch, ranks)
    for engine in ENGINES if name == "v3" else ENGINES[:2]:
        workers = engine_boxes(arch, **engine)
        draft = {part for entry in model_entries(arch) for part in entry.hf} - {
            part for entry in engine_entries(arch) for part in entry.hf
        }
        check_names([named for worker in workers for named in worker], holders, draft.__contains__)
        for bucket_bytes in (1 << 14, 1 << 30):
            plan = plan_feed([workers], holders, lambda rank: rank != 1, bucket_bytes)
            assert all(bucket.size <= bucket_bytes for bucket in plan.buckets)
            check_exact(plan, workers, holders, ranks)


def test_what_a_rank_that_feeds_has_it_gives_itself_and_others_share_the_rest():
    arch = full_architecture()
    holders = TrainerHolders(arch, described(arch, dp=4))
    workers = engine_boxes(arch)
    own = plan_feed([workers], holders, lambda rank: rank != 2, 1 << 20)
    assert {part.source for bucket in own.buckets for part in bucket.parts} == {2}
    shared = plan_feed([workers], holders, lambda rank: 0, 1 << 20)
    given = dict.fromkeys(range(4), 0)
    for bucket in shared.buckets:
        for part in bucket.parts:
            given[part.source] += sum(volume(piece.box) * piece.dtype.itemsize for piece in part.pieces)
    assert max(given.values()) < 1.3 * min(given.values())


def test_stages_of_a_pipeline_work_at_the_same_time():
    """Each bucket has parts of both, or one of them would wait half of the time."""
    arch = full_architecture(mtp=0)
    holders = TrainerHolders(arch, described(arch, pp=2))
    plan = plan_feed([engine_boxes(arch)], holders, lambda rank: 0, 1 << 16)
    assert len(plan.buckets) > 4 and all({part.source for part in bucket.parts} == {0, 1} for bucket in plan.buckets[:-1])


def test_regions_are_those_of_the_destinations():
    arch = full_architecture(mtp=0)
    holders = TrainerHolders(arch, described(arch, tp=2))
    workers = engine_boxes(arch, tp=2)
    plan = plan_feed([[worker] for worker in workers], holders, lambda rank: 0, 1 << 16)
    for number, bucket in enumerate(plan.buckets):
        assert bucket.regions[0][0] == 0 and bucket.regions[0][1] == bucket.regions[1][0] and bucket.size <= 1 << 16
        for (start, stop), ((pieces,)) in zip(
            bucket.regions, [[of[number] for of in workers] for workers in plan.taken], strict=True
        ):
            assert all(piece.checksum_at + CHECKSUM_BYTES <= stop - start for piece in pieces)


def test_what_nobody_gives_or_holds_is_named():
    source = StoredWeights.of_tensors({"a": torch.ones(4, 2), "b": torch.ones(3), "mtp": torch.ones(1)})
    whole = [("a", ((0, 4), (0, 2))), ("b", ((0, 3),))]
    check_names(whole, source, lambda name: name == "mtp")
    for engine, says in (
        (whole[:1], "sent but not held: b$"),
        ([*whole, ("c", ((0, 1),))], "held but not sent: c$"),
        ([("a", ((0, 4), (0, 1))), whole[1]], "not held whole: a$"),
        ([("a", ((0, 4), (0, 3))), whole[1]], "of another shape: a$"),
        ([("a", ((0, 8),)), whole[1]], "of another shape: a$"),
    ):
        with pytest.raises(WeightSyncError, match=says):
            check_names(engine, source, lambda name: name == "mtp")
    with pytest.raises(WeightSyncError, match="no rank of the trainer has: c$"):
        plan_feed([[[("c", ((0, 1),))]]], source, lambda rank: 0, 1 << 20)
    assert cover(((0, 4),), [(((0, 2),), [0])], lambda rank: 0) is None


@cache
def full_size() -> tuple[Architecture, list[RankShards]]:
    arch = PRESETS["671b"]
    return arch, described(arch, tp=2, pp=16, ep=32, dp=16)


def test_bytes_of_an_engine_rank_of_v3_are_its_shard_and_less_than_two_percent():
    """671B: 512 ranks of a trainer, an engine of 32 data-parallel ranks with their experts, of which two are planned."""
    arch, ranks = full_size()
    holders = TrainerHolders(arch, ranks)
    workers = engine_boxes(arch, dp=32, expert_parallel=True)
    expert = 3 * 7168 * 2048
    attention_etc = 2 * (sum(volume(box) for name, box in workers[0]) - 8 * 58 * expert)
    plan = plan_feed([workers[:2]], holders, lambda rank: (rank != 0, rank >= 8), 1 << 30)
    assert max(bucket.size for bucket in plan.buckets) <= 1 << 30
    for worker, buckets in zip(workers[:2], plan.taken[0], strict=True):
        held = sum(volume(box) * holders.dtype(name).itemsize for name, box in worker)
        received = sum(volume(piece.box) * piece.dtype.itemsize + CHECKSUM_BYTES for pieces in buckets for piece in pieces)
        assert held <= received < 1.02 * held
        assert abs(held - (attention_etc + 2 * 8 * 58 * expert)) < 1e-3 * held
    # In a node's memory what its workers hold alike is once, and a rank describes itself in few bytes.
    assert sum(bucket.size for bucket in plan.buckets) < 1.02 * (attention_etc + 2 * 2 * 8 * 58 * expert)
    assert max(len(shards.runs) for shards in ranks) < 40
