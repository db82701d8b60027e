"""Each prompt of a step once, and rotation without copies: vLLM's own bits."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonPrefillMetadata
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from megatron_r1.rollout.vllm.cpu_latent import rotate, share_prompts


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(prompts: list[list[int]], decodes: int = 0) -> tuple[torch.Tensor, MLACommonMetadata]:
    """vLLM's token ids and metadata of a step; a request has cache blocks of its own."""
    lengths = [1] * decodes + [len(prompt) for prompt in prompts]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    blocks = torch.arange(len(lengths))[:, None]
    slots = torch.cat([16 * number + torch.arange(length) for number, length in enumerate(lengths)])
    prefill = MLACommonPrefillMetadata(
        block_table=blocks[decodes:], query_start_loc=starts[decodes:] - decodes, max_query_len=max(lengths),
        query_lens_cpu=torch.tensor(lengths[decodes:]),
    )  # fmt: skip
    metadata = MLACommonMetadata(
        num_reqs=len(lengths), max_query_len=max(lengths), max_seq_len=max(lengths), num_actual_tokens=sum(lengths),
        query_start_loc=starts, slot_mapping=slots, num_decodes=decodes, num_decode_tokens=decodes, num_prefills=len(prompts),
        prefill=prefill if prompts else None,
    )  # fmt: skip
    return torch.tensor([9] * decodes + [token for prompt in prompts for token in prompt]), metadata


def test_a_step_has_each_prompt_once_behind_the_tokens_of_responses():
    a, b, c = [3, 1, 4], [3, 1, 4, 1], [5, 9]
    token_ids, metadata = step([a, b, a, a, c, b], decodes=2)
    shared = share_prompts(token_ids, metadata)
    assert token_ids[shared.rows].tolist() == [9, 9, *a, *b, *c]
    assert torch.equal(token_ids[shared.rows][shared.row_of], token_ids)
    found = shared.metadata
    assert (found.num_reqs, found.num_decodes, found.num_prefills, found.num_actual_tokens) == (5, 2, 3, 11)
    assert found.query_start_loc.tolist() == [0, 1, 2, 5, 9, 11] and found.query_start_loc.dtype == torch.int32
    assert found.prefill.query_start_loc.tolist() == [0, 3, 7, 9] and found.prefill.query_lens_cpu.tolist() == [3, 4, 2]
    assert found.prefill.block_table.flatten().tolist() == [2, 3, 6] and torch.equal(
        found.slot_mapping, metadata.slot_mapping[shared.rows]
    )
    assert metadata.num_prefills == 6 and metadata.prefill.query_start_loc[-1] == 19, "vLLM's own stays"


def test_the_cache_of_each_request_is_filled():
    token_ids, metadata = step([[3, 1, 4], [5, 9], [3, 1, 4], [5, 9]], decodes=1)
    shared = share_prompts(token_ids, metadata)
    slots, whole, cache = metadata.slot_mapping, torch.zeros(5, 16, 8), torch.full((5, 16, 8), -1.0)
    rows = tokens(6, 8)
    whole.view(-1, 8)[slots] = rows[shared.row_of]
    cache.view(-1, 8)[slots[shared.rows]] = rows
    shared.fill_cache(cache, slots)
    assert torch.equal(cache.view(-1, 8)[slots], whole.view(-1, 8)[slots])
    untouched = torch.ones(80, dtype=torch.bool).index_fill(0, slots, False)
    assert (cache.view(-1, 8)[untouched] == -1).all()


@pytest.mark.parametrize("prompts", [[], [[3, 1]], [[3, 1], [3, 1, 4], [1, 3]]])
def test_where_no_two_prompts_are_alike_the_step_stays(prompts: list[list[int]]):
    assert share_prompts(*step(prompts, decodes=2)) is None


def test_what_is_cached_before_a_prompt_is_left_to_vllm():
    token_ids, metadata = step([[3, 1], [3, 1]])
    assert share_prompts(token_ids, metadata) is not None
    metadata.prefill.chunked_context = object()
    assert share_prompts(token_ids, metadata) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_has_vllms_bits(dtype: torch.dtype):
    positions, cache = torch.tensor([0, 3, 17, 3]), tokens(32, 64).to(dtype)
    wide = tokens(4, 4, 96, seed=1).to(dtype)
    query, key = wide[..., 32:], tokens(4, 1, 64, seed=2).to(dtype)
    ours = rotate(positions, query, key, 64, 64, cache, False)
    theirs = RotaryEmbedding.forward_static(positions, query, key, 64, 64, cache, False)
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(ours, theirs, strict=True))


def test_other_rotations_are_left_to_vllm():
    positions, cache, x = torch.tensor([0]), tokens(4, 64), tokens(1, 1, 64)
    assert rotate(positions, x, x, 64, 64, cache, True) is None
    assert rotate(positions, x, None, 64, 64, cache, False) is None
    assert rotate(positions, tokens(1, 1, 96), tokens(1, 1, 96), 96, 64, cache, False) is None
