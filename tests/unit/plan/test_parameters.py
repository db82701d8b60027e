"""A plan against what the real builder allocates: parameters, gradient buffers, optimizer, on every kind of layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.mcore import host
from megatron_r1.mcore.layout import Layout, resolve_layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.job import Job, read_job
from megatron_r1.plan.parameters import held_parameters
from megatron_r1.plan.static import rank_state
from tests.random_weights import full_architecture, llama_architecture, qwen2_architecture

host.activate("cpu")

from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module

from megatron_r1.mcore import meta, parallel
from megatron_r1.mcore.adam_state import distributed_optimizers, state_tensors
from megatron_r1.mcore.build_optimizer import build_optimizer
from megatron_r1.mcore.overlap import wrap_for_training
from megatron_r1.mcore.provider import build_model

V3, QWEN = full_architecture(), qwen2_architecture()
WIDE_V3 = V3.model_copy(update={"hidden_size": 256, "vocab_size": 2000, "moe_intermediate_size": 64})
WIDE_QWEN = QWEN.model_copy(update={"hidden_size": 192, "head_dim": 32, "intermediate_size": 512, "vocab_size": 3001})
ANY_LAYOUT: list[tuple[int, dict[str, int]]] = [
    (1, {}), (4, {}), (2, {"tp": 2}), (4, {"pp": 2}), (4, {"pp": 2, "vpp": 2}), (4, {"tp": 2, "pp": 2}), (4, {"cp": 2}),
]  # fmt: skip
OF_EXPERTS: list[tuple[int, dict[str, int]]] = [
    (4, {"ep": 2}), (4, {"tp": 2, "ep": 4}), (8, {"tp": 2, "ep": 2, "etp": 2}), (8, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
    (8, {"pp": 2, "ep": 4}),
]  # fmt: skip
LAYOUTS = [
    *((arch, size, sizes) for arch in (WIDE_V3, WIDE_QWEN) for size, sizes in ANY_LAYOUT),
    *((WIDE_V3, size, sizes) for size, sizes in OF_EXPERTS),
]


def ranks_of(layout: Layout) -> list[int]:
    """The first rank of every pipeline stage."""
    return [stage * layout.world_size // layout.pp for stage in range(layout.pp)]


@pytest.mark.parametrize(
    ("arch", "size", "sizes"),
    [*LAYOUTS, (llama_architecture(), 2, {"tp": 2}), (QWEN.as_reward_model("helpful"), 2, {"pp": 2})],
    ids=lambda value: value.model_type if isinstance(value, Architecture) else "-".join(f"{k}{v}" for k, v in value.items())
    if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_parameters_are_those_that_are_built(arch: Architecture, size: int, sizes: dict[str, int]) -> None:
    layout = resolve_layout(ParallelConfig(**sizes), arch, size, mtp=False)
    ranks = ranks_of(layout)
    for stage, built in enumerate(meta.meta_ranks(arch, layout, ranks)):
        held = held_parameters(arch, layout, stage)
        parameters = [parameter for module in built.modules for parameter in module.parameters()]
        assert held.all == sum(parameter.numel() for parameter in parameters)
        of_experts = sum(parameter.numel() for parameter in parameters if not getattr(parameter, "allreduce", True))
        assert of_experts == held.experts or arch.mtp_depth, "experts of multi-token prediction are frozen here"
        assert held.largest == max(parameter.numel() for parameter in parameters)
        buffers = [buffer for module in built.modules for name, buffer in module.named_buffers() if "router" in name]
        assert held.buffer_bytes == sum(buffer.nbytes for buffer in buffers)


def test_the_published_model_is_counted_as_built() -> None:
    arch = PRESETS["671b"]
    layout = resolve_layout(ParallelConfig(tp=8, pp=16, ep=32), arch, 512, mtp=False)
    ranks = [0, 480]
    for stage, built in zip((0, 15), meta.meta_ranks(arch, layout, ranks), strict=True):
        held = held_parameters(arch, layout, stage, trains_mtp=True)
        assert held.all == sum(parameter.numel() for module in built.modules for parameter in module.parameters())
    assert held_parameters(arch, layout, 1).experts == 4 * 8 * 3 * 7168 * 2048, "layers 4 to 7, eight experts of each"


@contextmanager
def built(job: Job, rank: int) -> Iterator[tuple[list[torch.nn.Module], list[torch.nn.Module], object]]:
    """Modules, wrapped modules and optimizer of a job's rank, in a world whose collectives do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    with meta._quick_start():
        dist.init_process_group(dist.Backend.FAKE, store=FakeStore(), rank=rank, world_size=job.world_size)
        try:
            parallel.build_process_groups(job.layout, seed=0)
            modules = build_model(job.arch, job.layout, job.runtime, job.moe, seed=0, switches=job.switches)
            config = modules[0].config
            chunks = wrap_for_training([Float16Module(config, m) if config.bf16 else m for m in modules], config, job.switches)
            yield modules, chunks, build_optimizer(job.arch, job.optimizer, job.runtime, chunks, job.switches)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def job_of(arch: Architecture, size: int, sizes: dict[str, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("megatron_r1.plan.job.shape_of_model", lambda model: (arch, "a test"))
    trained = MoeTrainingConfig(mtp_loss_scale=0.3) if dtype == "bf16" and arch.mtp_depth else MoeTrainingConfig()
    config = Config(parallel=ParallelConfig(**sizes), runtime=RuntimeConfig(dtype=dtype, device="cpu"))
    config = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"moe": trained, "mask_documents": False})})
    return read_job(config, "pretrain", world_size=size)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_state_is_what_the_builder_allocates(number: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, size, sizes = LAYOUTS[number]
    job = job_of(arch, size, sizes, dtype, monkeypatch)
    for stage, rank in enumerate(ranks_of(job.layout)):
        planned = rank_state(job, stage).state
        with built(job, rank) as (modules, chunks, optimizer):
            held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
            biases = sum(buffer.nbytes for m in modules for name, buffer in m.named_buffers() if "router" in name)
            buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
            states = (tensor for part in distributed_optimizers(optimizer) for tensor in state_tensors(part))
            own = sum(tensor.nbytes for tensor in states if tensor.untyped_storage().data_ptr() not in held)
            for name, found, want in (
                ("weights", sum(held.values()) + biases, planned.weights),
                ("gradients", sum(buffer.grad_data.nbytes for buffer in buffers), planned.gradients),
                ("optimizer", own, planned.optimizer),
            ):
                assert found == pytest.approx(want, rel=1e-3), (name, stage, found, want)


def test_frozen_parameters_have_no_state() -> None:
    layout = Layout()
    all_trained, frozen = (held_parameters(V3, layout, 0, trains_mtp=trained) for trained in (True, False))
    assert all_trained.frozen == 0 and frozen.frozen == all_trained.all - frozen.dense - frozen.experts > 0
    router = held_parameters(V3, layout, 0, trains_mtp=True, freeze_router=True)
    assert router.frozen == 5 * V3.hidden_size * V3.n_routed_experts, "four layers, and the one of multi-token prediction"
    scored = held_parameters(V3.as_reward_model("safety"), layout, 0, trains=False)
    assert scored.dense == scored.experts == scored.dense_buffer == 0 < scored.frozen
