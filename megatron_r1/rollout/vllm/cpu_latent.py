"""Latent attention of vLLM's CPU engine with fewer passes over memory, and the same results to the bit.

vLLM 0.32 computes prompts one after the other, though those of a group are alike, and rotates queries and keys with two copies more
than they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

#: Tokens of a prompt from which on a product of several prompts has the bits of one for each: torch has another way for small ones.
SHORTEST_TOGETHER = 16
MOST_SCORES = 1 << 22  #: attention scores of one product, 16 MiB in float32

Ragged = Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


def attend(
    own: Ragged,
    backend: object,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_cu_seq_lens: torch.Tensor,
    kv_cu_seq_lens: torch.Tensor,
    causal: bool,
    return_softmax_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """In place of `CPUSDPAMLAPrefillBackend._ragged_sdpa`, whose method is `own`.

    Args:
        q, k, v: [tokens, heads, width], sequences one after the other.
        q_cu_seq_lens, kv_cu_seq_lens: [sequences + 1], their limits.

    Returns:
        [tokens, heads, width of v].
    """
    if return_softmax_lse or not causal or kv_cu_seq_lens is not q_cu_seq_lens or q.dtype != torch.float32:
        return own(backend, q, k, v, q_cu_seq_lens, kv_cu_seq_lens, causal, return_softmax_lse)
    scale: float = backend.scale  # type: ignore[attr-defined]
    heads = q.shape[1]
    out = torch.empty(q.shape[0], heads, v.shape[-1], dtype=v.dtype)
    mask = torch.empty(0, 0, dtype=torch.bool)
    for start, count, length in alike(q_cu_seq_lens.tolist(), heads):
        end = start + count * length
        q_n, k_n, v_n = (t[start:end].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q_n, k_n.transpose(-2, -1)) * scale
        if len(mask) != length:
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores.masked_fill_(mask, float("-inf"))
        out[start:end].unflatten(0, (count, length)).copy_(torch.matmul(torch.softmax(scores, dim=-1), v_n).transpose(1, 2))
    return out


def alike(limits: list[int], heads: int) -> Iterator[tuple[int, int, int]]:
    """Neighbours of one length: their first token, their number, their length."""
    first, sequences = 0, len(limits) - 1
    while first < sequences:
        start, length = limits[first], limits[first + 1] - limits[first]
        most = MOST_SCORES // max(1, heads * length * length) if length >= SHORTEST_TOGETHER else 1
        last = first + 1
        while last < sequences and last - first < most and limits[last + 1] - limits[last] == length:
            last += 1
        yield start, last - first, length
        first = last


def rotate(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    rotary_dim: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """In place of the `forward_static` of vLLM's rotary embedding, where the whole head is rotated and neighbours make pairs.

    Returns:
        Rotated query and key in their shapes; None for another kind.
    """
    if is_neox_style or rotary_dim != head_size or key is None:
        return None
    cos, sin = cos_sin_cache.index_select(0, positions.flatten()).unsqueeze(1).chunk(2, dim=-1)
    return _turn_pairs(query, cos, sin, head_size), _turn_pairs(key, cos, sin, head_size)


def _turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_size: int) -> torch.Tensor:
    heads = x.view(len(cos), -1, head_size)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = heads[..., ::2], heads[..., 1::2]
    out = torch.empty(heads.shape, dtype=x.dtype)
    torch.sub(even * cos, odd * sin, out=out[..., ::2])
    torch.add(odd * cos, even * sin, out=out[..., 1::2])
    return out.view(x.shape)
