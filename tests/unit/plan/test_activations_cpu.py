"""What a CPU keeps of forward passes, against torch's account of real updates: kinds of recomputation, pipeline, packing."""

from __future__ import annotations

import pytest

from megatron_r1.config.model import ParallelConfig
from megatron_r1.mcore.layout import resolve_layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.plan.activations_cpu import Rows, cpu_activation_bytes, cpu_layer_numbers, wide_logits
from tests.activation_account import most_kept
from tests.random_weights import full_architecture, qwen2_architecture

WIDER = {"hidden_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 1024}
DENSE = qwen2_architecture().model_copy(update=WIDER | {"head_dim": 32, "intermediate_size": 1120})
SPARSE = full_architecture().model_copy(
    update=WIDER
    | {
        "intermediate_size": 640, "moe_intermediate_size": 128, "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32,
    }
)  # fmt: skip
TOKENS = 128
BOTH = (DENSE, SPARSE)
ROW = Rows(TOKENS, TOKENS, TOKENS, is_packed=False)


def check(
    arch: Architecture, rows: Rows, lengths: list[int], *, rank: int = 0, world_size: int = 1, recompute: str = "none",
    modules: tuple[str, ...] = (), mtp: bool = False, **sizes: int,
) -> None:  # fmt: skip
    layout = resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=mtp)
    settings = {"recompute": recompute, "modules": modules}
    found = most_kept(
        arch, lengths, TOKENS, world_size=world_size, rank=rank, mtp=mtp, packed=rows.is_packed, **settings, **sizes
    )  # fmt: skip
    stage = rank * layout.pp // world_size
    counted = cpu_activation_bytes(
        arch, layout, rows, stage, mtp_trained=mtp, micro_batches=sum(lengths) // TOKENS or 1, **settings
    )  # fmt: skip
    assert found == pytest.approx(counted, rel=0.05), (found / counted, settings, sizes)


@pytest.mark.parametrize("arch", BOTH, ids=lambda arch: arch.model_type)
@pytest.mark.parametrize(
    ("recompute", "modules"),
    [
        ("none", ()), ("full", ()), ("selective", ("layernorm",)), ("selective", ("core_attn",)), ("selective", ("mlp",)),
        ("selective", ("moe", "mla_up_proj", "shared_experts")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_every_kind_of_recomputation(arch: Architecture, recompute: str, modules: tuple[str, ...]) -> None:
    if arch is DENSE and "moe" in modules:
        return
    check(arch, ROW, [TOKENS], recompute=recompute, modules=modules)


@pytest.mark.parametrize("arch", BOTH, ids=lambda arch: arch.model_type)
@pytest.mark.parametrize(("rank", "sizes"), [(0, {"pp": 2}), (1, {"pp": 2}), (0, {"pp": 2, "vpp": 2})], ids=str)
def test_micro_batches_in_flight(arch: Architecture, rank: int, sizes: dict[str, int]) -> None:
    check(arch, ROW, [TOKENS] * 4, rank=rank, world_size=2, recompute="full" if rank else "none", **sizes)


@pytest.mark.parametrize("arch", BOTH, ids=lambda arch: arch.model_type)
def test_packed_sequences_lie_in_rows(arch: Architecture) -> None:
    check(arch, Rows(TOKENS, 32, TOKENS, is_packed=True), [32] * 4)
    check(arch, Rows(TOKENS, 50, 200, is_packed=True), [50, 30, 30, 18])


def test_multi_token_prediction_and_experts_elsewhere() -> None:
    check(SPARSE, ROW, [TOKENS], mtp=True)
    check(SPARSE, ROW, [TOKENS], world_size=2, ep=2)


def test_only_attention_of_latent_vectors_grows_with_the_square() -> None:
    def growth(arch: Architecture) -> float:
        short, long = (cpu_layer_numbers(arch, 0, Rows(n, n, n, is_packed=False)) for n in (100, 200))
        return long - 2 * short

    assert growth(DENSE) == 0 and growth(SPARSE) == SPARSE.num_attention_heads * (200 * 200 - 2 * 100 * 100)


def test_of_the_logits_a_part_is_wide_at_a_time() -> None:
    layout = resolve_layout(ParallelConfig(), DENSE, 1, mtp=False)
    assert wide_logits(DENSE, layout, 10) == 3 * 10 * 130 * 4 and wide_logits(DENSE, layout, 10**6) == 3 * 2**22
    assert wide_logits(DENSE.as_reward_model("helpful"), layout, 10) == 0
