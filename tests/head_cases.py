"""Log-probs by tiles against plain torch over whole logits, on any number of tensor-parallel ranks and by any tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from megatron_r1.mcore import head_bytes, logits_tiles
from megatron_r1.mcore.fused_head import Head, token_losses

TOKENS, HIDDEN, ROWS = 37, 16, 104
VOCABULARY = 101  #: of the rows; the last three are padding
PRECISION = {torch.float32: 1e-6, torch.float64: 1e-13}  #: of the largest number


def use_small_tiles() -> None:
    """In this process: tiles of a few rows, and blocks of a part of their columns."""
    head_bytes.TILE, head_bytes.TILE_ON_CUDA, logits_tiles.BLOCK = 10 * ROWS, 10 * ROWS, 200


def draw(dtype: torch.dtype, device: str = "cpu", vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, ...]:
    """Hidden states, the whole weight with padding, labels and the gradient of every loss; logits as wide as a trained model's."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn((n, HIDDEN), generator=generator) for n in (TOKENS, ROWS))
    labels = torch.randint(vocabulary, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    drawn = hidden.to(dtype), (weight * 2).to(dtype), labels, upstream
    return tuple(tensor.to(device) for tensor in drawn)


def whole(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, *, temperature: float, vocabulary: int
) -> list[torch.Tensor]:
    """Losses, entropies and gradients of hidden states and weight, by torch."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden @ weight[:vocabulary].t()).to(upstream.dtype) / temperature
    logprobs = logits.log_softmax(-1)
    loss = -logprobs.gather(-1, labels[:, None])[:, 0]
    loss.backward(upstream)
    return [loss.detach(), -(logprobs.exp() * logprobs).sum(-1).detach(), hidden.grad, weight.grad]


def by_tiles(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, head: Head
) -> list[torch.Tensor]:
    """The same by tiles, of this rank's part of the weight; the gradient of hidden states is the group's."""
    width = weight.shape[0] // head.group.size()
    hidden = hidden.clone().requires_grad_()
    weight = weight[head.group.rank() * width :][:width].clone().requires_grad_()
    loss, entropies = token_losses(hidden, weight, labels, head)
    loss.backward(upstream)
    if head.group.size() > 1:
        dist.all_reduce(hidden.grad, group=head.group)
    return [loss.detach(), entropies, hidden.grad, weight.grad]


def part_of(slopes: torch.Tensor, rows: slice, losses: torch.Tensor) -> torch.Tensor:
    """A slope that is known beforehand."""
    assert losses.isfinite().all() and len(losses) == len(slopes[rows])
    return slopes[rows]


def check_head(
    group: dist.ProcessGroup, *, device: str = "cpu", tiles: Callable[..., logits_tiles.LogitTiles] | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64), vocabulary: int = VOCABULARY,
    temperatures: tuple[float, ...] = (1.0, 0.7), slopes: tuple[float, ...] = (1.0, 3.0),
) -> None:  # fmt: skip
    """Losses, entropies and gradients are torch's; whether the slope is known, right or wrong, changes no bit.

    `slopes` are slopes to be given, as parts of the right one.
    """
    mine = slice(group.rank() * ROWS // group.size(), (group.rank() + 1) * ROWS // group.size())
    for dtype in dtypes:
        drawn = draw(dtype, device, vocabulary)
        upstream = drawn[3]
        for temperature in temperatures:
            want = whole(*drawn, temperature=temperature, vocabulary=vocabulary)
            want[3] = want[3][mine]
            ours = by_tiles(*drawn, Head(temperature, group, vocabulary, entropy=True, tiles=tiles))
            for factor in slopes:
                slope = partial(part_of, factor * upstream)
                head = Head(temperature, group, vocabulary, slope=slope, entropy=True, tiles=tiles)
                known = by_tiles(*drawn, head)
                assert head.guessed == (factor == 1.0)
                assert all(torch.equal(a, b) for a, b in zip(known, ours, strict=True))
            for number, (found, exact) in enumerate(zip(ours, want, strict=True)):
                assert found.dtype == exact.dtype
                # A gradient of bfloat16 is rounded: of logits, of a tile, of what all tiles come to.
                precision = 3 * torch.finfo(dtype).eps if dtype == torch.bfloat16 and number > 1 else PRECISION[found.dtype]
                off = (found.double() - exact.double()).abs().max()
                assert off <= precision * exact.double().abs().max(), (dtype, temperature, number, off)
