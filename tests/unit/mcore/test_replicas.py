"""Copies of weights are compared: all of them and nothing else, whatever the layout, and a broken one is named."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from megatron_r1.mcore import host
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import PRESETS
from megatron_r1.model.rows import Split
from megatron_r1.pipeline.stages.common import resume_run
from megatron_r1.weights.local_weights import local_weights
from megatron_r1.weights.mapping import model_entries
from tests.random_weights import full_architecture, qwen2_architecture

host.activate("cpu")

from megatron_r1.mcore import replicas
from tests.fake_ranks import built_ranks

V3, QWEN2 = full_architecture(), qwen2_architecture(tied=True)
#: kind of copy -> model, ranks, layout, name of a weight, the rank whose copy is broken, how the line names the ranks
BROKEN = {
    "whole on every tensor-parallel rank": (
        V3, 8, {"tp": 2, "pp": 2}, "model.layers.1.self_attn.kv_a_proj_with_mqa.weight", 1, "rank 1 | ranks 0, 2, 3"),
    "data parallel": (V3, 8, {"tp": 2, "pp": 2}, "model.layers.4.self_attn.o_proj.weight", 7, "rank 5 | rank 7"),
    "experts' data parallel": (V3, 8, {"tp": 2, "pp": 2}, "model.layers.2.mlp.experts.3.down_proj.weight", 2, "rank 0 | rank 2"),
    "experts with experts split": (
        V3, 8, {"ep": 2, "pp": 2}, "model.layers.2.mlp.experts.5.gate_proj.weight", 3, "rank 1 | rank 3"),
    "a buffer": (V3, 8, {"ep": 2, "pp": 2}, "model.layers.2.mlp.gate.e_score_correction_bias", 2, "rank 2 | ranks 0, 1, 3"),
    "embedding of multi-token prediction": (V3, 8, {"tp": 2, "pp": 2}, "model.embed_tokens.weight", 6, "rank 6 | ranks 0, 2, 4"),
    "tied output layer": (QWEN2, 4, {"tp": 2, "pp": 2}, "model.embed_tokens.weight", 3, "rank 1 | rank 3"),
}  # fmt: skip


@cache
def held_by_ranks(world_size: int, is_tied: bool, sizes: tuple[tuple[str, int], ...]) -> tuple[Layout, list, dict]:
    """Layout, checksums of all ranks, and those of the one rank whose copy is broken, for each kind that this layout is to show."""
    arch = QWEN2 if is_tied else V3
    entries = model_entries(arch)
    of_ranks, broken, found = [], {}, None
    for rank, (layout, modules, groups) in enumerate(built_ranks(arch, world_size, **dict(sizes))):
        found, local = layout, local_weights(modules, arch, groups)
        parts = replicas.shared_parts(arch, layout)
        of_ranks.append(replicas.checksums(local, parts, groups))
        for kind, (model, ranks, other, name, broken_rank, _) in BROKEN.items():
            if (model, ranks, tuple(other.items()), broken_rank) == (arch, world_size, sizes, rank):
                tensor = local.tensors[next(i for i in local.tensors if name in entries[i].hf)][-1]
                before = tensor.clone()
                tensor.view(-1)[-1] += 1
                broken[kind] = replicas.checksums(local, parts, groups)
                tensor.copy_(before)
    return found, of_ranks, broken


def reduce(of_ranks: list[dict[int, list[int]]], places: int) -> list[int]:
    return replicas.disagreements(torch.stack([replicas.extremes(held, places) for held in of_ranks]).amax(0))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_copy_is_named(kind: str) -> None:
    arch, world_size, sizes, name, rank, ranks = BROKEN[kind]
    layout, of_ranks, broken = held_by_ranks(world_size, arch is QWEN2, tuple(sizes.items()))
    parts = replicas.shared_parts(arch, layout)
    places = sum(parts.values())
    assert reduce(of_ranks, places) == []
    changed = [broken[kind] if i == rank else held for i, held in enumerate(of_ranks)]
    differing = reduce(changed, places)
    line = replicas.describe(differing, changed, parts, model_entries(arch))
    assert len(differing) == 1 and "\n" not in line
    expected = " | ".join(sorted(ranks.split(" | "), key=lambda group: [int(n) for n in group.split(" ", 1)[1].split(", ")]))
    assert f"replicas of a weight differ: {named(arch, name)} ({expected}); " in line


def named(arch: Architecture, name: str) -> str:
    """How lines call the weight that holds this one."""
    return next(entry.name for entry in model_entries(arch) if name in entry.hf)


@pytest.mark.parametrize("kind", ["data parallel", "experts with experts split", "tied output layer"])
def test_all_copies_are_compared_and_nothing_else(kind: str) -> None:
    """Every place of the comparison is held at least twice, but for a vocabulary that no other stage needs."""
    arch, world_size, sizes, *_ = BROKEN[kind]
    layout, of_ranks, _ = held_by_ranks(world_size, arch is QWEN2, tuple(sizes.items()))
    parts, entries = replicas.shared_parts(arch, layout), model_entries(arch)
    times = [sum(len(held.get(place, ())) for held in of_ranks) for place in range(sum(parts.values()))]
    kinds = [entries[i].split for i, count in parts.items() for _ in range(count)]
    assert all(n > 1 or (n == 1 and split is Split.VOCAB) for n, split in zip(times, kinds, strict=True))
    alone = layout.dp * layout.cp == 1
    assert {entries[i].split for i in parts} >= {Split.REPLICATED, Split.VOCAB}
    assert alone == any(entries[i].split is Split.ROW for i in set(range(len(entries))) - set(parts))


def test_what_671b_on_512_ranks_costs() -> None:
    """One pass over what is held twice, and one reduction of 16 bytes a part; a ring moves them twice past every rank."""
    arch, world_size = PRESETS["671b"], 512
    for sizes, largest_read, largest_sent in (
        ({"dp": 4, "ep": 32}, 2e8, 1e5),  # examples/v3_671b: of each expert there is one copy
        ({"dp": 4, "ep": 8}, 5.5e9, 1.1e6),  # of each there are four
    ):
        layout = Layout(tp=8, pp=16, etp=1, world_size=world_size, **sizes)
        parts, entries = replicas.shared_parts(arch, layout), model_entries(arch)
        elements = {i: math.prod(entries[i].full_shape) // (count * layout.pp) for i, count in parts.items()}
        read = sum(n // (layout.ep if entries[i].expert is not None else 1) for i, n in elements.items())  # on an average rank
        sent = 2 * (world_size - 1) / world_size * 16 * sum(parts.values())
        assert read < largest_read and sent < largest_sent, (read, sent)


def test_every_tensor_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(replicas, "checksum", lambda tensor: read.append(tensor.numel()) or 0)
    for layout, modules, groups in built_ranks(QWEN2, 2):
        local = local_weights(modules, QWEN2, groups)
        read.clear()
        replicas.checksums(local, replicas.shared_parts(QWEN2, layout), groups)
        assert sum(read) == sum(p.numel() for p in modules[0].parameters())
    layout, modules, groups = next(built_ranks(QWEN2, 1))
    assert replicas.shared_parts(QWEN2, layout) == {}, "one rank has nothing to compare"


@pytest.mark.parametrize("resumed_from", [None, "a checkpoint"])
def test_every_run_begins_with_it(resumed_from: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all is loaded, whatever was."""
    from megatron_r1.mcore import checkpoint

    done: list[str] = []
    monkeypatch.setattr(checkpoint, "load_policy", lambda *_: done.append("loaded"))
    run = type("Run", (), {"resumed_from": resumed_from, "state": None})
    resume_run(run, type("Policy", (), {"check_replicas": lambda self: done.append("compared")})())
    assert done == ["loaded"] * (resumed_from is not None) + ["compared"]
