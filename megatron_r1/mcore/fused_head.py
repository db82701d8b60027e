"""Log-probs of tokens from hidden states, without the logits of more than some rows at a time.

Projection, softmax, the target's log-prob and the entropy are one step, over rows of tokens and blocks of this rank's part of the
vocabulary; between ranks go three or four numbers a token. The backward pass, which two numbers a token are kept for, computes the
logits again, tile by tile. Where the loss's slope can be asked for in the forward pass already, it does not have to: see `Slope`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.mcore.head_bytes import rows_at_a_time
from megatron_r1.mcore.logits_tiles import CHOSEN, LARGEST, TOTAL, WEIGHTED, LogitTiles, TorchTiles, combine

#: Takes rows and their -log p [R], and gives the gradient [R] that the backward pass will bring to these, or a guess at it. It is
#: asked for all rows, in order. A right guess saves the backward pass; a wrong one costs as much, and changes no result.
Slope = Callable[[slice, torch.Tensor], torch.Tensor]


@dataclass
class Head:
    """How log-probs follow from hidden states.

    Attributes:
        temperature: above 0; logits are divided by it in float32.
        group: the tensor-parallel ranks, in the order of their parts of the vocabulary.
        vocabulary: tokens of all ranks; rows of the weight after them are padding, which has no part of any probability.
        slope: of the loss; None: the backward pass computes logits again.
        sums: [rows of the weight, hidden] float32, to which the backward pass adds the weight's gradient instead of returning it;
            it then returns zeros, which whoever waits for a gradient may add. None: it returns the gradient.
        entropy: whether the entropies are asked for.
        guessed: after the backward pass, whether the slope was right; None before it, and without one.
    """

    temperature: float
    group: dist.ProcessGroup
    vocabulary: int
    slope: Slope | None = None
    sums: torch.Tensor | None = None
    entropy: bool = False
    guessed: bool | None = None
    tiles: Callable[[torch.Tensor, float, int], LogitTiles] | None = None  #: None: those of the device


def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-log p [N] of the labels, with gradient, and entropies [N], without: in nats, and float32 at least. Collective in the group.

    The gradient of `hidden` is this rank's part, from its part of the vocabulary: whoever calls adds those of the group. Gradients
    are summed in float32 over tiles; in the backward pass, of one rank's tiles alone.

    Args:
        hidden: [N, hidden], the same on every rank of the group.
        weight: [rows of the vocabulary / ranks, hidden], this rank's part, of the same dtype.
        labels: [N] ids of the whole vocabulary.
    """
    guesses = head.slope is not None and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    losses, entropies = _TokenLosses.apply(hidden, weight, labels, head, guesses)
    return losses, entropies if head.entropy else None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head, guesses: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tiles, targets, parts = _tiles(hidden, weight, labels, head)
        found, upstream = [], []
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad[1], None) if guesses else None
        for part in parts:
            own = tiles.project(hidden[part], targets[part], head.entropy)
            # Without a slope nothing waits for the other ranks' numbers: they come in one piece.
            found.append(_of_group(own, head.group) if guesses else own)
            if gradients is not None:
                upstream.append(head.slope(part, _losses(found[-1])))
                gradients.add(tiles, part, found[-1], upstream[-1])
        nothing = hidden.new_zeros((4 if head.entropy else 3, 0), dtype=torch.promote_types(hidden.dtype, torch.float32))
        of_all = torch.cat([nothing, *found], 1)
        if not guesses:
            of_all = _of_group(of_all, head.group)
        ctx.head, ctx.gradients, ctx.upstream = head, gradients, torch.cat(upstream) if upstream else None
        ctx.save_for_backward(hidden, weight, labels, of_all[: CHOSEN + 1])
        entropies = of_all[TOTAL].log() - of_all[WEIGHTED] / of_all[TOTAL] if head.entropy else of_all.new_empty(0)
        ctx.mark_non_differentiable(entropies)
        return _losses(of_all), entropies

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, found = ctx.saved_tensors
        head, gradients = ctx.head, ctx.gradients
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.gradients = None
        if ctx.upstream is not None:
            head.guessed = torch.equal(ctx.upstream, upstream)
        if gradients is None or not head.guessed:
            gradients = None  # a wrong guess's, before those of the right one take as much
            tiles, targets, parts = _tiles(hidden, weight, labels, head)
            gradients = _Gradients(hidden, weight, needs_weight, head.sums)
            for part in parts:
                tiles.project(hidden[part], targets[part], False)
                gradients.add(tiles, part, found[:, part], upstream[part])
        elif head.sums is not None and gradients.weight is not None:
            head.sums.add_(gradients.weight)
            gradients.weight = None
        return (
            gradients.hidden if needs_hidden else None,
            (torch.zeros_like(weight) if head.sums is not None else gradients.weight.to(weight.dtype)) if needs_weight else None,
            None,
            None,
            None,
        )


class _Gradients:
    """Of hidden states and weight, row by row."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, needs_weight: bool, sums: torch.Tensor | None) -> None:
        self.hidden = torch.zeros_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = (torch.zeros_like(weight, dtype=wide) if sums is None else sums) if needs_weight else None

    def add(self, tiles: LogitTiles, part: slice, found: torch.Tensor, upstream: torch.Tensor) -> None:
        self.hidden[part] = tiles.gradient(found[LARGEST], found[TOTAL], upstream, self.weight)


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head
) -> tuple[LogitTiles, torch.Tensor, list[slice]]:
    """Tiles over this rank's tokens of the vocabulary, the labels' places there, and the rows of each, the same on every rank."""
    first, count = head.group.rank() * weight.shape[0], hidden.shape[0]
    tokens = min(max(head.vocabulary - first, 0), weight.shape[0])
    rows = rows_at_a_time(weight.shape[0], count, cuda=weight.is_cuda)
    tiles = (head.tiles or _tiles_of_device(weight))(weight[:tokens], head.temperature, rows)
    return tiles, labels - first, [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _tiles_of_device(weight: torch.Tensor) -> Callable[[torch.Tensor, float, int], LogitTiles]:
    if not weight.is_cuda:
        return TorchTiles
    from megatron_r1.mcore.logits_triton import TritonTiles  # Triton compiles for GPUs alone

    return TritonTiles


def _losses(found: torch.Tensor) -> torch.Tensor:
    return found[TOTAL].log() - (found[CHOSEN] - found[LARGEST])


def _of_group(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The statistics over the whole vocabulary, the same on every rank."""
    if group.size() == 1 or not own.numel():
        return own
    of_ranks = own.new_empty((group.size(), *own.shape))
    dist.all_gather_into_tensor(of_ranks.view(-1), own.contiguous().view(-1), group=group)
    return combine(of_ranks)
