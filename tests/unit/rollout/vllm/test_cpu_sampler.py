"""Draws taken ahead are those of single calls, whatever is taken back and whoever draws beside."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from megatron_r1.rollout.vllm import cpu_sampler
from megatron_r1.rollout.vllm.cpu_sampler import AHEAD, DrawsAhead


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def single(generator: torch.Generator) -> int:
    """vLLM's own draw."""
    return int(torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long).item())


def test_numbers_are_those_of_single_calls():
    draws, requests, plain = DrawsAhead(), [seeded(7), seeded(8)], [seeded(7), seeded(8)]
    for step in range(3 * AHEAD):
        for number in (0, 1)[: 1 + step % 2]:
            assert draws.next(requests[number]) == single(plain[number])


@pytest.mark.parametrize("at", [1, AHEAD - 1, AHEAD, AHEAD + 1])
def test_what_is_taken_back_comes_again(at: int):
    draws, generator = DrawsAhead(), seeded(3)
    numbers = [draws.next(generator) for _ in range(at)]
    draws.take_back(generator)
    assert draws.next(generator) == numbers[-1]
    plain = seeded(3)
    assert [*numbers, draws.next(generator)] == [single(plain) for _ in range(at + 1)]


def test_what_was_not_drawn_is_not_taken_back_and_a_request_that_ended_leaves_nothing():
    draws = DrawsAhead()
    with pytest.raises(KeyError):
        draws.take_back(seeded(0))
    draws.next(seeded(1))
    gc.collect()
    assert not draws._numbers
    assert 8_192 * AHEAD * 36 < 10e6, "bytes of all requests of an engine with 8,192: an int and its place in a list"


@pytest.mark.parametrize("seeded_rows", [(0, 1, 2), (1,), ()])
@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits", "raw_logprobs"])
def test_the_tokens_are_vllms(seeded_rows: tuple[int, ...], mode: str):
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    current_platform.import_kernels()
    sampler = SimpleNamespace(logprobs_mode=mode, use_fp64_gumbel=False)
    logits = torch.randn(3, 50, generator=seeded(0))
    own = vars(TopKTopPSampler)["forward_cpu"]
    assert own.__module__ == "vllm.v1.sample.ops.topk_topp_sampler", "not changed in this process"
    ours, theirs = ({row: seeded(row) for row in seeded_rows} for _ in range(2))
    for top_p in (None, torch.full((3,), 0.8)):
        torch.manual_seed(5)
        tokens, returned = cpu_sampler.draw_tokens(sampler, logits.clone(), ours, None, top_p)
        torch.manual_seed(5)
        expected, expected_return = own(sampler, logits.clone(), theirs, None, top_p)
        if len(seeded_rows) in (0, 3):
            assert torch.equal(tokens, expected)
        assert all(tokens[row] == expected[row] for row in seeded_rows)
        assert (returned is None) == (expected_return is None)
        assert returned is None or torch.equal(returned, expected_return)
