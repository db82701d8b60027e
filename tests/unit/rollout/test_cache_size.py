"""The KV cache that an engine on a CPU gets where the user gives no size: what is computed at a time, or what memory allows."""

from __future__ import annotations

import pytest

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout.cache_size import choose_cache, sequence_bytes
from megatron_r1.rollout.options import engine_options
from tests.random_weights import llama_architecture

LLAMA, TINY = llama_architecture(), PRESETS["tiny"]
ROOM = 1 << 50


def choose(arch, **settings):
    given = {"max_model_len": 80, "max_num_seqs": 64, "workers": 1, "free_bytes": ROOM, "share": 0.5}
    return choose_cache(arch, "float32", **(given | settings))


def test_a_sequence_takes_whole_blocks_of_each_layer():
    of_token = 4 * LLAMA.num_hidden_layers * 2 * LLAMA.num_key_value_heads * LLAMA.head_dim
    assert [sequence_bytes(LLAMA, "float32", tokens) for tokens in (1, 32, 33, 80)] == [of_token * n for n in (32, 32, 64, 96)]
    assert sequence_bytes(LLAMA, "bfloat16", 32) * 2 == sequence_bytes(LLAMA, "float32", 32)
    assert sequence_bytes(LLAMA, "float32", 600) == of_token * 640, "vLLM's own blocks, of 128"
    latent = 4 * TINY.num_hidden_layers * (TINY.kv_lora_rank + TINY.qk_rope_head_dim)
    assert [sequence_bytes(TINY, "float32", tokens) for tokens in (16, 17)] == [latent * 16, latent * 32]
    assert sequence_bytes(TINY, "float32", 16, workers=4) == latent * 16, "each worker keeps the whole latent"
    assert sequence_bytes(LLAMA, "float32", 32, workers=2) * 2 == of_token * 32, "workers share the heads"


def test_all_that_is_computed_at_a_time_has_room_and_a_block_is_left_for_vllm():
    chosen = choose(LLAMA)
    block = sequence_bytes(LLAMA, "float32", 32)
    assert chosen.bytes == (64 * 3 + 1) * block and chosen.sequences == 64
    assert choose(LLAMA, max_num_seqs=128).bytes == (128 * 3 + 1) * block
    assert "room for 64 sequences" in chosen.describe() and "rollout.max_num_seqs=64 of up to 80 tokens" in chosen.describe()


@pytest.mark.parametrize("arch", [LLAMA, TINY], ids=["grouped", "latent"])
def test_memory_bounds_it_down_to_one_sequence(arch):
    each = sequence_bytes(arch, "float32", 80)
    chosen = choose(arch, free_bytes=each * 21)
    assert chosen.sequences == 10 and 10 * each < chosen.bytes <= each * 21 // 2
    assert "are more than 0.5 (rollout.gpu_memory_utilization) of the free memory" in chosen.describe()
    assert choose(arch, free_bytes=each * 21, share=1.0).sequences == 20
    assert choose(arch, free_bytes=0).sequences == 1 and choose(arch, free_bytes=0).bytes > each
    bounded = choose(arch, most_bytes=each * 10 + each // 2)
    assert bounded == choose(arch, free_bytes=each * 21) or bounded.sequences == 10 and bounded.bytes <= each * 10 + each // 2
    assert "of up to 80 tokens are more than 0.0" in bounded.describe() and "free memory" not in bounded.describe()
    assert choose(arch, most_bytes=0).sequences == 1
    enough = choose(arch).bytes
    assert choose(arch, most_bytes=enough) == choose(arch)
    assert choose(arch, free_bytes=2 * enough).bytes == enough > choose(arch, free_bytes=2 * enough - 2).bytes


@pytest.mark.parametrize(("arch", "tokens", "block"), [(LLAMA, 504, 32), (LLAMA, 505, 128), (TINY, 504, 16), (TINY, 505, 16)])
def test_blocks_are_small_on_a_cpu_and_vllms_on_a_gpu(arch, tokens, block):
    arch = arch.model_copy(update={"max_position_embeddings": 1024})
    limits = {"dtype": "float32", "bos_token_id": 0, "eos_token_id": 1, "max_prompt_tokens": 8}
    rollout = RolloutConfig(max_response_tokens=tokens)
    assert engine_options(arch, rollout, device="cpu", **limits).block_tokens == block
    assert engine_options(arch, rollout, device="cuda", **limits).block_tokens is None
