"""Bytes that a plan says travel, against what the real code hands to collectives and engines."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.config.model import ParallelConfig
from megatron_r1.mcore import host
from megatron_r1.mcore.layout import Layout, resolve_layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.traffic import sync_bytes, update_traffic
from megatron_r1.weights.local_weights import local_weights
from tests.activation_account import most_kept
from tests.fake_ranks import built_ranks
from tests.random_weights import full_architecture, qwen2_architecture

host.activate("cpu")

from megatron.core.distributed import param_and_grad_buffer

from megatron_r1.mcore import megatron_model

TOKENS, MICRO_BATCHES = 64, 4
DENSE = qwen2_architecture().model_copy(update={"hidden_size": 64})
SPARSE = full_architecture()


class Collectives(TorchDispatchMode):
    """The largest tensors of every collective and message: of both sides of an exchange, the one that is in `sizes`."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._sizes = sizes

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.name().split("::")
        if name[0] == "c10d":
            held = [tensor.nbytes for tensor in tensors_in(args)]
            found = next((size for size in held if size in self._sizes), 0) if "alltoall" in name[1] else max(held, default=0)
            self.bytes[name[1]] += found
        return function(*args, **(kwargs or {}))


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize(
    ("arch", "world_size", "rank", "sizes"),
    [
        (DENSE, 2, 0, {}), (DENSE, 2, 1, {"pp": 2}), (DENSE, 2, 0, {"pp": 2, "vpp": 2}), (DENSE, 2, 0, {"tp": 2}),
        (SPARSE, 4, 0, {"pp": 2, "ep": 2}), (SPARSE, 4, 2, {"ep": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_an_update_hands_over_what_is_planned(
    arch: Architecture, world_size: int, rank: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=False)
    copies = arch.experts.per_token if arch.experts is not None else 1
    counted = Collectives({TOKENS * copies * arch.hidden_size * 4})
    stock, shards = megatron_model.MegatronModel._run, Counter[str]()

    def run(model: megatron_model.MegatronModel, *arguments: Any, **settings: Any) -> Any:
        with counted:
            found = stock(model, *arguments, **settings)
        for chunk in model.chunks:
            chunk.start_param_sync(force_sync=True)
        return found

    def shard(name: str) -> Any:
        # Of a group of one there is nothing to send. How a collective is made of messages is gloo's or NCCL's.
        def count(output: torch.Tensor, input_: torch.Tensor, *_: Any, group: Any, **__: Any) -> None:
            shards[name] += max(output.nbytes, input_.nbytes) * (group.size() > 1)

        return count

    monkeypatch.setattr(megatron_model.MegatronModel, "_run", run)
    monkeypatch.setattr(param_and_grad_buffer, "dist_reduce_scatter_func", shard("gradients"))
    monkeypatch.setattr(param_and_grad_buffer, "dist_all_gather_func", shard("weights"))
    most_kept(arch, [TOKENS] * MICRO_BATCHES, TOKENS, world_size=world_size, rank=rank, packed=False, **sizes)
    stage = rank * layout.pp // world_size
    planned = update_traffic(arch, layout, stage, tokens=TOKENS, micro_batches=MICRO_BATCHES, width=4)
    found = counted.bytes
    assert shards["gradients"] == pytest.approx(planned.gradients, rel=1e-3)
    assert shards["weights"] == pytest.approx(planned.weights, rel=1e-3)
    assert found["send"] == planned.pipeline and found["alltoall_base_"] == planned.experts
    assert found["_allgather_base_"] + found["_reduce_scatter_base_"] == planned.tensor or arch is SPARSE


def test_engines_get_every_weight_but_those_of_multi_token_prediction() -> None:
    for arch in (SPARSE, DENSE):
        for _, modules, groups in built_ranks(arch, 1):
            local = local_weights(modules, arch, groups)
            given = sum(
                tensor.numel() for entry, tensors in local.tensors.items() for tensor in tensors
                if "mtp" not in local.entries[entry].megatron[0]
            )  # fmt: skip
            assert sync_bytes(arch, "float32") == 4 * given and sync_bytes(arch, "bfloat16") == 2 * given


def test_the_published_job() -> None:
    """Stage 1 of 16 at 512 ranks: gradients of 1.6 billion parameters over four ranks, experts on one; 32 copies go to others."""
    arch, layout = PRESETS["671b"], Layout(tp=8, pp=16, ep=32, dp=4, sequence_parallel=True, world_size=512)
    found = update_traffic(arch, layout, 1, tokens=34816, micro_batches=8, width=2, recompute="full")
    hidden = 34816 // 8 * 7168 * 2
    assert found.pipeline == 2 * 8 * hidden and found.experts == 4 * 6 * 8 * 8 * hidden
    assert found.gradients == 2 * found.weights < 4 * 200e6, "experts have no other copy"
    assert found.tensor is None and round(sync_bytes(arch, "bfloat16") / 1e9) == 1342
