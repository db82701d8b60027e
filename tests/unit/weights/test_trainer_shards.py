"""What each rank of a running layout says it holds, and gives, is the model's own."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.weights.boxes import box_shape, uncovered, volume, whole_box
from megatron_r1.weights.mapping import hf_shapes, model_entries
from megatron_r1.weights.trainer_shards import TrainerHolders, TrainerShards
from tests.fake_ranks import built_ranks
from tests.random_weights import full_architecture, qwen2_architecture


@pytest.mark.parametrize(
    ("name", "world_size", "sizes"),
    [("v3", 4, {"tp": 2, "ep": 4}), ("v3", 4, {"tp": 2, "pp": 2, "ep": 2}), ("v3", 4, {"tp": 2, "ep": 2, "etp": 2}),
     ("qwen2", 2, {"tp": 2})],
    ids=str,
)  # fmt: skip
def test_what_ranks_hold_is_the_whole_model_and_what_they_give_has_its_shape(name, world_size, sizes):
    arch = full_architecture() if name == "v3" else qwen2_architecture(tied=True)
    described, given = [], []
    for _, modules, groups in built_ranks(arch, world_size, **sizes):
        shards = TrainerShards(modules, arch, groups)
        own = shards.describe()
        described.append(own)
        holders = TrainerHolders(arch, [own])
        for tensor in holders.names():
            if holders.shape(tensor) is None:
                continue
            ((box, ranks),) = holders.boxes(tensor)
            value = shards.read(tensor, box)
            assert ranks == [0] and tuple(value.shape) == box_shape(box) and value.dtype == holders.dtype(tensor)
            half = tuple((start + (stop - start) // 2, stop) for start, stop in box)
            assert torch.equal(shards.read(tensor, half), value[tuple(slice(size // 2, None) for size in box_shape(box))])
            given.append((tensor, box))
    holders = TrainerHolders(arch, described)
    shapes = {part: shape for entry in model_entries(arch) for part, shape in zip(entry.hf, entry.shapes, strict=True)}
    assert set(holders.names()) == shapes.keys() <= hf_shapes(arch).keys()
    for tensor, shape in shapes.items():
        assert holders.shape(tensor) == shape
        boxes = [box for box, _ in holders.boxes(tensor)]
        assert not uncovered(whole_box(shape), boxes) and sum(map(volume, boxes)) == volume(whole_box(shape)), "cut, not repeated"
        assert sum(len(ranks) for _, ranks in holders.boxes(tensor)) == sum(known == tensor for known, _ in given)


def test_a_model_that_no_rank_holds_whole_is_seen():
    arch = qwen2_architecture(tied=True)
    (first, *_) = [TrainerShards(modules, arch, groups).describe() for _, modules, groups in built_ranks(arch, 2, pp=2)]
    holders = TrainerHolders(arch, [first])
    assert holders.shape("model.norm.weight") is None and holders.shape("no such tensor") is None
    assert holders.shape("model.embed_tokens.weight") == (arch.vocab_size, arch.hidden_size)
