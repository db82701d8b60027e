"""Shards from ranks to engines: whose tensors, who writes, and what an error of one rank does to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1.errors import ConversionError, EngineLost, WeightSyncError
from megatron_r1.rollout.sync.memory_file import MemoryFile
from megatron_r1.rollout.sync.transfer import WeightTransfer, map_file
from megatron_r1.weights.boxes import whole_box
from megatron_r1.weights.shard_plan import StoredWeights
from tests.engine_layouts import MemoryEngine
from tests.ranks import run_ranks

TENSORS = {
    "a": torch.randn(300, 17), "b": torch.randn(5), "c": torch.randn(64, 64).bfloat16(), "scalar": torch.tensor(3.0),
    "wide": torch.randn(2, 5000),
}  # fmt: skip


def engine(**settings) -> MemoryEngine:
    whole = [(name, whole_box(tensor.shape)) for name, tensor in TENSORS.items()]
    half = [("a", ((150, 300), (0, 17))), ("c", ((0, 64), (0, 32)))]
    return MemoryEngine([whole, half], lambda name: TENSORS[name].dtype, **settings)


def test_every_worker_gets_its_boxes_in_many_buckets_by_one_plan():
    to, transfer = engine(), WeightTransfer()
    for factor in (1, 2):
        tensors = {name: tensor * factor for name, tensor in TENSORS.items()}
        sent = transfer.send(StoredWeights.of_tensors(tensors), to)
        assert to.problems(tensors.__getitem__) == []
    assert to.plans == 1 and len(sent.plan.buckets) > 5
    assert (sent.num_tensors, sent.num_bytes) == (len(TENSORS), sum(tensor.nbytes for tensor in TENSORS.values()))
    held = [sum(tensor.nbytes for tensor in worker.values()) for worker in to.held]
    assert all(2 * size <= received < 2 * 1.02 * size for size, received in zip(held, to.received, strict=True))
    again = engine()
    transfer.send(StoredWeights.of_tensors(TENSORS), again)
    assert again.plans == 1 and again.problems(TENSORS.__getitem__) == [], "another engine, another plan"


def test_a_new_layout_makes_a_new_plan_and_a_missing_tensor_is_named():
    to, transfer = engine(), WeightTransfer()
    transfer.send(StoredWeights.of_tensors(TENSORS), to)
    fewer = {name: tensor for name, tensor in TENSORS.items() if name != "b"}
    with pytest.raises(WeightSyncError, match="held but not sent: b$"):
        transfer.send(StoredWeights.of_tensors(fewer), to)
    wider = TENSORS | {"c": TENSORS["c"].float()}
    transfer.send(StoredWeights.of_tensors(wider), to)
    assert to.plans == 2 and to.problems(TENSORS.__getitem__) == []


def test_errors_of_reading_and_of_the_engine_are_raised_and_the_next_update_works():
    def lose(number: int) -> None:
        if number == lost_at:
            raise EngineLost("gone")

    lost_at = 2
    to, transfer = engine(on_bucket=lose), WeightTransfer()
    with pytest.raises(EngineLost, match="gone"):
        transfer.send(StoredWeights.of_tensors(TENSORS), to)
    lost_at = -1
    source = StoredWeights.of_tensors(TENSORS)
    read = source.read
    source.read = lambda name, box: read(name, box) if name != "c" else fail()
    with pytest.raises(ConversionError, match="broken"):
        transfer.send(source, to)
    transfer.send(StoredWeights.of_tensors(TENSORS), to)
    assert to.problems(TENSORS.__getitem__) == []


def fail():
    raise ConversionError("broken")


def test_a_file_in_memory_is_shared_and_what_is_none_is_refused(tmp_path: Path):
    file = MemoryFile(100)
    map_file(file.path)[7] = 9
    assert int(file.bytes[7]) == 9
    file.close()
    with pytest.raises(OSError):
        map_file(file.path)
    with pytest.raises(ValueError, match="is no file"):
        map_file("/dev/null")


RANKS = """
import sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConversionError, EngineLost, WeightSyncError
from megatron_r1.rollout.sync import transfer as module
from megatron_r1.rollout.sync.links import NodeLink
from megatron_r1.rollout.sync.transfer import WeightTransfer, map_file
from megatron_r1.weights.boxes import box_shape, slices_within, volume, whole_box
from megatron_r1.weights.shard_plan import StoredWeights
from tests.engine_layouts import MemoryEngine

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[3], 3), rank=rank, world_size=3)
TENSORS = {f"t{i}": torch.arange(7.0 * 40).view(40, 7) + i for i in range(6)}

class Rows:
    # rank r holds rows of every tensor that no other rank holds
    broken = False
    def describe(self):
        return ("rows", rank)
    def find_holders(self, described):
        return self
    def names(self):
        return TENSORS
    def shape(self, name):
        return tuple(TENSORS[name].shape) if name in TENSORS else None
    def dtype(self, name):
        return torch.float32
    def boxes(self, name):
        return [(((10 * r, 10 * r + 10 if r < 2 else 40), (0, 7)), (r,)) for r in range(3)]
    def read(self, name, box):
        assert 10 * rank <= box[0][0] and (rank == 2 or box[0][1] <= 10 * rank + 10)
        if self.broken and rank == 2:
            raise ConversionError("broken")
        return TENSORS[name][slices_within(box, whole_box((40, 7)))]

def fails(call, error, message):
    try:
        call()
    except error as caught:
        assert message in str(caught), caught
    else:
        raise AssertionError("no error")

whole = [(name, whole_box((40, 7))) for name in TENSORS]
lost_at = -1
def lose(number):
    if number == lost_at:
        raise EngineLost("gone")
def start():
    return MemoryEngine([whole], bucket_bytes=4096, on_bucket=lose) if rank < 2 else None

rows, transfer, engine = Rows(), WeightTransfer(), start()
def update(of=None):
    if engine is None:
        return transfer.give(rows)
    transfer.send(rows, engine)

for _ in range(2):
    update()
    if engine is not None:
        assert engine.problems(TENSORS.__getitem__) == [] and engine.plans == 1
        assert {part.source for bucket in engine.plan.buckets for part in bucket.parts} == {0, 1, 2}
Rows.broken = True  # every rank raises, and none waits for the bytes that do not come
fails(update, ConversionError, "broken")
Rows.broken = False
lost_at = 1 if rank == 1 else -1  # the others go on without it
fails(update, EngineLost, "gone") if rank == 1 else update()
if rank == 0:
    assert engine.problems(TENSORS.__getitem__) == []
lost_at = -1
engine = start() if rank == 1 else engine  # only this one is given the weights
if rank == 1:
    transfer.send(rows, engine)
    assert engine.problems(TENSORS.__getitem__) == [] and engine.plans == 1
else:
    transfer.give(rows)

# through the node's memory: other ranks write where the feeding rank's workers read
options = SimpleNamespace(verify_weights=True, bucket_bytes=4096, is_draft_layer=lambda name: False, nodes=1)
calls, took = [], {}
def call(name, *args):
    calls.append(name)
    if name == "call_workers" and args[0] == "weight_boxes":
        return [whole]
    if name == "call_workers":
        took["plan"] = args[1][0]
    if name == "update_weights":
        region = map_file(args[0]["paths"][0])
        for piece in took["plan"][args[0]["number"]]:
            size = volume(piece.box) * 4
            values = region[piece.offset : piece.offset + size].view(torch.float32).view(box_shape(piece.box))
            assert torch.equal(values, TENSORS[whole[piece.index][0]][slices_within(piece.box, whole_box((40, 7)))])
            took["rows"] = took.get("rows", 0) + box_shape(piece.box)[0]
link = NodeLink(call, options) if rank == 0 else None
transfer.send(rows, link) if rank == 0 else transfer.give(rows)
if rank == 0:
    assert took["rows"] == 6 * 40 and transfer._plan.remote == set() and calls[2] == "start_weight_update"
else:
    assert list(transfer._plan.mapped) == [0]
# from another node, or another container, it cannot be reached
module._map_buckets = lambda feed: None
transfer._told = None
transfer.send(rows, link) if rank == 0 else transfer.give(rows)
if rank == 0:
    assert took["rows"] == 2 * 6 * 40 and transfer._plan.remote == {1, 2}
    link.close()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_give_what_they_hold_and_fail_together(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    run_ranks(script, 3, tmp_path / "store", timeout=120)
