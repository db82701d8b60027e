"""Some rows of logits at a time, by torch: what their log-probs need of them, and the gradient behind them.

A row's logits are computed block by block of the vocabulary. Everything that is done to a block number by number follows its matrix
product at once, while the block is in a core's cache, and each exponential is computed once for both passes: beside its matrix
products, a row costs less than with its logits in memory.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_r1.mcore.head_bytes import BLOCK, COLUMNS_OF_SUMS


class LogitTiles(Protocol):
    """The logits of rows by one rank's part of the vocabulary, kept from `project` until the next rows come.

    Logits are rounded to the weights' dtype, as the rollout engine rounds them, and divided by the temperature in float32. What is
    not finite is not looked for: a NaN or an infinite logit makes its row's statistics and gradient NaN.
    """

    def project(self, hidden: torch.Tensor, targets: torch.Tensor, entropy: bool) -> torch.Tensor:
        """[3, R], or [4, R] with entropy, in float32: see `statistics`.

        Args:
            hidden: [R, hidden].
            targets: [R] places in this rank's part; a negative one or one beyond it is another rank's.
            entropy: whether the last row is asked for.
        """
        ...

    def gradient(
        self, largest: torch.Tensor, total: torch.Tensor, upstream: torch.Tensor, d_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """The gradient [R, hidden] of the hidden states last given, from this part of the vocabulary. Once for each `project`.

        Args:
            largest: [R] over the whole vocabulary.
            total: [R] sum of exponentials over the whole vocabulary, of logits less the largest.
            upstream: [R] gradient of -log p of the targets.
            d_weight: [part of the vocabulary, hidden] float32, to which the weight's gradient is added.
        """
        ...


#: Rows of what `project` gives, over one rank's part of the vocabulary: the largest logit; the sum of exponentials of logits less
#: that; the target's logit, 0 if the target is elsewhere; the sum of logits less the largest times their exponentials.
LARGEST, TOTAL, CHOSEN, WEIGHTED = range(4)


class TorchTiles:
    """`LogitTiles` on any device.

    Args:
        weight: [part of the vocabulary, hidden], without rows of padding.
        temperature: above 0.
        rows: most that will be asked for at a time.
    """

    def __init__(self, weight: torch.Tensor, temperature: float, rows: int) -> None:
        width = weight.shape[0]
        self._weight, self._temperature = weight, temperature
        self._wide = torch.promote_types(weight.dtype, torch.float32)
        self._columns = max(1, BLOCK // rows)
        self._starts = range(0, width, self._columns)
        self._room = weight.new_empty(rows * width, dtype=self._wide)

    def project(self, hidden: torch.Tensor, targets: torch.Tensor, entropy: bool) -> torch.Tensor:
        """See `LogitTiles`."""
        count, lowest = hidden.shape[0], torch.finfo(self._wide).min
        self._hidden, self._targets = hidden, targets
        of_blocks = hidden.new_zeros((4 if entropy else 3, len(self._starts), count), dtype=self._wide)
        for number, start in enumerate(self._starts):
            block, of_block = self._block(start), of_blocks[:, number]
            self._multiply(hidden, start, block)
            rows, places = self._own(start, block.shape[1])
            of_block[CHOSEN, rows] = block[rows, places]
            # With infinities alone, less the largest they would be NaN; one that is a NaN stays one.
            largest = torch.amax(block, -1, out=of_block[LARGEST]).clamp_(min=lowest)
            block.sub_(largest.unsqueeze(-1))
            if entropy:
                less = block.clamp(min=lowest)
                torch.sum(less.mul_(block.exp_()), -1, out=of_block[WEIGHTED])
            else:
                block.exp_()
            torch.sum(block, -1, out=of_block[TOTAL])
        self._largest = of_blocks[LARGEST]
        if not len(self._starts):  # all of this part is padding
            return of_blocks.new_zeros((of_blocks.shape[0], count)).index_fill_(0, targets.new_tensor([LARGEST]), lowest)
        return combine(of_blocks.transpose(0, 1))

    def gradient(
        self, largest: torch.Tensor, total: torch.Tensor, upstream: torch.Tensor, d_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LogitTiles`."""
        upstream = upstream.to(self._wide) / self._temperature
        factors = (self._largest - largest).exp_().mul_(upstream / total)
        d_hidden = torch.zeros_like(self._hidden, dtype=self._wide)
        for number, start in enumerate(self._starts):
            block = self._block(start).mul_(factors[number].unsqueeze(-1))
            rows, places = self._own(start, block.shape[1])
            block[rows, places] -= upstream[rows]
            block = block.to(self._weight.dtype)
            stop = start + block.shape[1]
            add_product(d_hidden, block, self._weight[start:stop])
            if d_weight is not None:
                add_product(d_weight[start:stop], block.t(), self._hidden)
        return d_hidden

    def _block(self, start: int) -> torch.Tensor:
        """[R, columns], contiguous."""
        count, columns = self._hidden.shape[0], min(self._columns, self._weight.shape[0] - start)
        return self._room[start * count : (start + columns) * count].view(count, columns)

    def _multiply(self, hidden: torch.Tensor, start: int, block: torch.Tensor) -> None:
        weight = self._weight[start : start + block.shape[1]].t()
        if block.dtype == hidden.dtype:
            torch.mm(hidden, weight, out=block)
        else:
            block.copy_(torch.mm(hidden, weight))
        if self._temperature != 1.0:
            block.div_(self._temperature)

    def _own(self, start: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows whose target is in a block, and its places there."""
        places = self._targets - start
        rows = ((places >= 0) & (places < columns)).nonzero().flatten()
        return rows, places[rows]


def combine(parts: torch.Tensor) -> torch.Tensor:
    """The statistics [3 or 4, R] of a vocabulary from those of its parts [parts, 3 or 4, R]."""
    largest = parts[:, LARGEST].amax(0)
    less = parts[:, LARGEST] - largest
    scale = less.exp()
    rows = [largest, (parts[:, TOTAL] * scale).sum(0), parts[:, CHOSEN].sum(0)]
    if parts.shape[1] > WEIGHTED:
        less = less.clamp(min=torch.finfo(parts.dtype).min)
        rows.append(((parts[:, WEIGHTED] + less * parts[:, TOTAL]) * scale).sum(0))
    return torch.stack(rows)


def add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to sums, which may be wider than both: on CUDA the product then never is as narrow as they are."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    elif sums.is_cuda:
        for start in range(0, sums.shape[0], COLUMNS_OF_SUMS):
            part = slice(start, start + COLUMNS_OF_SUMS)
            sums[part].add_(torch.mm(left[part], right, out_dtype=sums.dtype))
    else:
        sums.add_(torch.mm(left, right))
