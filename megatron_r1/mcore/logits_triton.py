"""Some rows of logits at a time, by torch's matrix products and two kernels of Triton, which read a tile once for each pass.

Triton's interpreter runs the same kernels on a CPU (`TRITON_INTERPRET=1`), which is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_r1.mcore.logits_tiles import add_product

_COLUMNS = 4096  # logits of a row that a program looks at together


class TritonTiles:
    """`LogitTiles` on CUDA, for float32 and bfloat16. A tile is kept in the weights' dtype, and its gradient is written over it.

    Args:
        weight: [part of the vocabulary, hidden], without rows of padding.
        temperature: above 0.
        rows: most that will be asked for at a time.
    """

    def __init__(self, weight: torch.Tensor, temperature: float, rows: int) -> None:
        self._weight, self._temperature = weight, temperature
        self._room = weight.new_empty((rows, weight.shape[0]))

    def project(self, hidden: torch.Tensor, targets: torch.Tensor, entropy: bool) -> torch.Tensor:
        """See `LogitTiles`."""
        self._hidden, self._targets = hidden, targets
        self._logits = self._room[: hidden.shape[0]]
        torch.mm(hidden, self._weight.t(), out=self._logits)
        found = hidden.new_empty((4, hidden.shape[0]), dtype=torch.float32)
        _find_statistics[(hidden.shape[0],)](
            self._logits, targets, found, self._logits.stride(0), *self._logits.shape, self._temperature, COLUMNS=_COLUMNS
        )
        return found if entropy else found[:3]

    def gradient(
        self, largest: torch.Tensor, total: torch.Tensor, upstream: torch.Tensor, d_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `LogitTiles`."""
        rows, width = self._logits.shape
        if width:
            _write_gradient[(rows, triton.cdiv(width, _COLUMNS))](
                self._logits, self._targets, largest.contiguous(), total.contiguous(), upstream.float().contiguous(),
                self._logits.stride(0), width, self._temperature, COLUMNS=_COLUMNS,
            )  # fmt: skip
        if d_weight is not None:
            add_product(d_weight[:width], self._logits.t(), self._hidden)
        return torch.mm(self._logits, self._weight)


@triton.jit
def _find_statistics(logits, targets, found, stride, rows, width, temperature, COLUMNS: tl.constexpr):
    """One row a program: what `LogitTiles.project` gives, block by block, each less the largest logit so far."""
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    lowest = -3.4028234663852886e38  # less it, an infinite logit is no NaN
    largest, total, weighted = lowest, 0.0, 0.0
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        here = columns < width
        block = tl.load(start_of_row + columns, mask=here, other=-float("inf")).to(tl.float32) / temperature
        # The largest of numbers and a NaN may be a number.
        broken = tl.sum((block != block).to(tl.int32), axis=0)  # noqa: PLR0124
        new = tl.maximum(tl.max(block, axis=0), largest)
        new = tl.where(broken > 0, float("nan"), new)
        scale = tl.exp(largest - new)
        weighted = (weighted + (largest - new) * total) * scale
        less = block - new
        exponentials = tl.exp(less)
        total = total * scale + tl.sum(exponentials, axis=0)
        weighted += tl.sum(tl.where(here, tl.maximum(less, lowest), 0.0) * exponentials, axis=0)
        largest = new
    target = tl.load(targets + row)
    is_here = (target >= 0) & (target < width)
    chosen = tl.load(start_of_row + target, mask=is_here, other=0.0).to(tl.float32) / temperature
    tl.store(found + row, largest)
    tl.store(found + rows + row, total)
    tl.store(found + 2 * rows + row, chosen)
    tl.store(found + 3 * rows + row, weighted)


@triton.jit
def _write_gradient(logits, targets, largest, total, upstream, stride, width, temperature, COLUMNS: tl.constexpr):
    """One block of a row a program: the gradient of the logits over them."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < width
    places = logits + row * stride + columns
    block = tl.load(places, mask=here, other=0.0)
    slope = tl.load(upstream + row) / temperature
    less = block.to(tl.float32) / temperature - tl.load(largest + row)
    probabilities = tl.exp(less) / tl.load(total + row)
    is_target = (columns == tl.load(targets + row)).to(tl.float32)
    tl.store(places, ((probabilities - is_target) * slope).to(block.dtype), mask=here)
