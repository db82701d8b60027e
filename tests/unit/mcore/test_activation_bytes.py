"""What a forward pass keeps, by the formula: what is computed again, micro-batches in flight, experts that are used more."""

from __future__ import annotations

import pytest

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore.activation_bytes import (
    ActivationBytes,
    activation_bytes,
    layer_numbers,
    logits_bytes,
    passes_in_flight,
)
from megatron_r1.mcore.head_bytes import WHOLE_LOGITS_MB
from megatron_r1.mcore.layout import Layout, resolve_layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.presets import PRESETS
from tests.random_weights import full_architecture, qwen2_architecture

WIDER = {"hidden_size": 192, "num_hidden_layers": 3, "max_position_embeddings": 1024}
DENSE = qwen2_architecture().model_copy(update=WIDER | {"head_dim": 32, "intermediate_size": 1120})
SPARSE = full_architecture().model_copy(
    update=WIDER
    | {
        "intermediate_size": 640, "moe_intermediate_size": 128, "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32,
    }
)  # fmt: skip


@pytest.mark.parametrize("arch", [DENSE, SPARSE], ids=lambda arch: arch.model_type)
def test_what_is_computed_again_is_not_kept(arch: Architecture) -> None:
    """The formula against torch's account: tests/unit/plan/test_activations_cpu.py."""
    tokens, layout = 512, resolve_layout(ParallelConfig(), arch, 1, mtp=False)
    numbers = tokens * 4

    def counted(recompute: str, *modules: str) -> ActivationBytes:
        return activation_bytes(arch, layout, recompute=recompute, tokens=tokens, stage=0, width=4, modules=modules)

    layers = [layer_numbers(arch, layer) for layer in range(3)]
    none, full = counted("none"), counted("full")
    assert none.kept == sum(layers) * numbers and none.recomputed == 0 and none.all == none.kept + none.logits
    assert full.kept == 3 * arch.hidden_size * numbers and full.recomputed == (max(layers) - arch.hidden_size) * numbers
    assert full.all == full.kept + max(full.recomputed, full.logits)
    for module in ("mlp", "moe", "shared_experts", "layernorm"):
        parts = counted("selective", module)
        left_out = [layer_numbers(arch, layer) - layer_numbers(arch, layer, [module]) for layer in range(3)]
        assert none.kept - parts.kept == sum(left_out) * numbers and parts.recomputed == max(left_out) * numbers


def test_modules_without_a_part_of_their_own_count_as_kept() -> None:
    assert layer_numbers(SPARSE, 2, ["core_attn", "mla_up_proj"]) == layer_numbers(SPARSE, 2)
    assert layer_numbers(SPARSE, 2, ["moe_act"]) < layer_numbers(SPARSE, 2)
    assert layer_numbers(DENSE, 0, ["layernorm"]) == layer_numbers(DENSE, 0), "fused with the next product"


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    four = Layout(pp=4, world_size=4)
    assert [passes_in_flight(four, stage) for stage in range(4)] == [[4], [3], [2], [1]]
    assert [passes_in_flight(four, stage, 2) for stage in range(4)] == [[2], [2], [2], [1]]
    interleaved = Layout(pp=2, vpp=3, world_size=2)
    # Rank 0 warms up with two for the stage that follows and 2 x 2 for the other virtual stages; one more, then the first backward.
    assert passes_in_flight(interleaved, 0) == [3, 2, 2] and passes_in_flight(interleaved, 1) == [2, 2, 1]
    assert passes_in_flight(interleaved, 0, 2) == [2, 2, 2], "all passes of two micro-batches"


def test_more_tokens_for_some_experts_keep_more() -> None:
    even, twice = (layer_numbers(SPARSE, 2, imbalance=factor) for factor in (1.0, 2.0))
    settings = SPARSE.megatron_settings()
    assert twice - even == settings["moe_router_topk"] * (5 * SPARSE.experts.width + SPARSE.hidden_size)
    assert layer_numbers(SPARSE, 0, imbalance=2.0) == layer_numbers(SPARSE, 0), "a dense layer"


def test_logits_of_a_large_vocabulary_are_a_large_part() -> None:
    arch = PRESETS["qwen2.5_1.5b"]
    layout = resolve_layout(ParallelConfig(), arch, 8, mtp=False)
    assert layer_numbers(arch, 0) * 2 == pytest.approx(114e3, rel=0.01), "bytes a token"
    assert logits_bytes(arch, layout, 32_768) == pytest.approx(9.96e9, rel=1e-3), "30e9 with a float32 softmax and a gradient"


def test_many_logits_are_tiles_that_take_the_same_for_any_tokens() -> None:
    assert RuntimeConfig().whole_logits_mb == WHOLE_LOGITS_MB
    arch = PRESETS["671b"]

    def logits(tokens: int, megabytes: int | None = WHOLE_LOGITS_MB, mtp: bool = False, **sizes: int) -> int:
        layout = resolve_layout(ParallelConfig(**sizes), arch, 8, mtp=mtp)
        return activation_bytes(
            arch, layout, recompute="full", tokens=tokens, stage=0, mtp_trained=mtp, whole_logits_mb=megabytes
        ).logits  # fmt: skip

    tiles = 2**27 * 2 + 8192 * 7168 * 4  # 0.5 GB, beside 8.5 GB of 32,768 tokens
    assert logits(32_768) == logits(1024) == tiles
    assert logits(32_768, 8500) == logits(32_768, None) == 32_768 * 129_280 * 2 + 2**28
    assert logits(900) == 900 * 129_280 * 2 + 2**28
    assert logits(32_768, tp=8, mtp=True) == tiles + 2 * 32_768 * 7168 * 2, "hidden states of all positions, for two heads"
