"""RoPE in a third of the passes over memory that Megatron-Core's formula takes. Pure: no Megatron-Core."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from megatron_r1.mcore.packing import packed_positions


def rotate_packed(
    t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, pairs: bool, scale: float, cp_size: int, cp_rank: int
) -> torch.Tensor:
    """t [n, heads, d] with the first `freqs.shape[-1]` numbers of each head rotated by its token's position.

    Result and gradient are those of Megatron-Core's `_apply_rotary_pos_emb_bshd`, bit by bit but for the sign of a zero.

    Args:
        cu_seqlens: as `packed_positions` takes it.
        freqs: [positions, 1, 1, r] angles, of the first half and of the second.
        pairs: the numbers that turn together lie side by side in `t`, and half a width apart in the result (latent attention).
        scale: of sine and cosine.
        cp_size: context-parallel ranks.
        cp_rank: this rank.
    """
    positions = packed_positions(cu_seqlens, t.shape[0], cp_size, cp_rank)
    # Of every position, not of every token: there are fewer.
    cos, sin = (table.squeeze(1)[positions] for table in _tables(freqs, scale, t.dtype))
    return _rotate(t, cos, sin, pairs)


def rotate_rows(t: torch.Tensor, freqs: torch.Tensor, *, pairs: bool, scale: float) -> torch.Tensor:
    """As `rotate_packed`, of rows: t [s, b, heads, d] and freqs [s, 1, 1, r]."""
    return _rotate(t, *_tables(freqs, scale, t.dtype), pairs)


_KEPT = 4  # tables: training has one, two where a phase changes
_TABLES: OrderedDict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = OrderedDict()


def _tables(freqs: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of all angles, times `scale`: the same for queries and keys of every layer and, as a rule, every step."""
    # A kept entry holds the angles, so nothing else can come to lie at their place.
    key = (freqs.data_ptr(), freqs._version, freqs.shape, freqs.stride(), freqs.dtype, freqs.device, scale, dtype)
    found = _TABLES.pop(key, None)
    if found is None:
        found = (freqs, (torch.cos(freqs) * scale).to(dtype), (torch.sin(freqs) * scale).to(dtype))
    _TABLES[key] = found
    if len(_TABLES) > _KEPT:
        _TABLES.popitem(last=False)
    return found[1:]


def _rotate(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: bool) -> torch.Tensor:
    width = cos.shape[-1]
    if width == t.shape[-1]:
        return _Rotate.apply(t, cos, sin, pairs)
    return torch.cat((_Rotate.apply(t[..., :width], cos, sin, pairs), t[..., width:]), dim=-1)


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin), where a and b are the halves of a head's numbers."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return _turn(torch.cat((t[..., 0::2], t[..., 1::2]), dim=-1) if pairs else t, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        turned = _turn(gradient, *ctx.saved_tensors, -1)
        if ctx.pairs:
            turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return turned, None, None, None


def _turn(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    """What `_Rotate` says for direction 1; for -1 the gradient of that."""
    (first, second), (sin_first, sin_second) = t.chunk(2, -1), sin.chunk(2, -1)
    if t.dtype != torch.float32:  # halves of a head are too short for the vectors of narrower numbers
        signed = (-sin_first, sin_second) if direction == 1 else (sin_second, -sin_first)
        return (t * cos).add_(t.roll(t.shape[-1] // 2, -1).mul_(torch.cat(signed, -1)))
    turned = t * cos
    out_first, out_second = turned.chunk(2, -1)
    if direction == 1:
        out_first -= second * sin_first
        out_second += first * sin_second
    else:
        out_first += second * sin_second
        out_second -= first * sin_first
    return turned
