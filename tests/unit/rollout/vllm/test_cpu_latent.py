"""Attention over several prompts at a time, and rotation without copies: vLLM's own bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

from megatron_r1.rollout.vllm import cpu_latent
from megatron_r1.rollout.vllm.cpu_latent import MOST_SCORES, SHORTEST_TOGETHER, alike, attend, rotate

OWN = vars(CPUSDPAMLAPrefillBackend)["_ragged_sdpa"]
BACKEND = SimpleNamespace(scale=0.1)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [(24,) * 16, (1,), (3, 3, 3), (16, 16, 5, 5, 130, 24, 24), (513, 513)])
@pytest.mark.parametrize(("heads", "width", "value_width"), [(4, 96, 32), (16, 192, 128)])
def test_the_bits_are_those_of_one_prompt_after_the_other(lengths, heads: int, width: int, value_width: int):
    limits = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    q, k = (tokens(sum(lengths), heads, width, seed=seed) for seed in (1, 2))
    v = tokens(sum(lengths), heads, width, seed=3)[..., :value_width]  # a part of a wider tensor, as in vLLM
    expected = OWN(BACKEND, q, k, v, limits, limits, causal=True, return_softmax_lse=False)
    assert torch.equal(attend(None, BACKEND, q, k, v, limits, limits, True, False), expected)


def test_what_it_does_not_know_is_left_to_vllm():
    asked = []

    def own(backend, *args):
        asked.append(args)
        return "its own"

    q, limits = tokens(4, 2, 8), torch.tensor([0, 4])
    for causal, lse, other, dtype in (
        (False, False, limits, torch.float32),
        (True, True, limits, torch.float32),
        (True, False, limits.clone(), torch.float32),
        (True, False, limits, torch.bfloat16),
    ):
        x = q.to(dtype)
        assert attend(own, BACKEND, x, x, x, limits, other, causal, lse) == "its own"
    assert [len(args) for args in asked] == [7] * 4


def test_prompts_go_together_up_to_a_number_of_scores(monkeypatch):
    limits = [0, 20, 40, 60, 63, 66, 86]
    assert list(alike(limits, heads=2)) == [(0, 3, 20), (60, 1, 3), (63, 1, 3), (66, 1, 20)]
    monkeypatch.setattr(cpu_latent, "MOST_SCORES", 2 * 2 * 20 * 20)
    assert list(alike(limits, heads=2))[:2] == [(0, 2, 20), (40, 1, 20)]
    monkeypatch.setattr(cpu_latent, "MOST_SCORES", 1)
    assert list(alike(limits, heads=2)) == [(0, 1, 20), (20, 1, 20), (40, 1, 20), (60, 1, 3), (63, 1, 3), (66, 1, 20)]
    assert list(alike([0], heads=2)) == []
    assert SHORTEST_TOGETHER == 16 and MOST_SCORES * 4 == 16 << 20, "bytes; a prompt of more scores goes alone, as it does in vLLM"


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
