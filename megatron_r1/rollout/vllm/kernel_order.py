"""The order in which vLLM's CPU kernel keeps the entries of an expert's matrix.

Blocks of rows one after the other; within a block its columns, some at a time; of these columns row after row:

    place(r, c) = r // b * b * columns + c // g * g * b + r % b * g + c % g

with b rows in a block and g columns in a group. Both are found by packing a matrix whose entries are their own positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from vllm._custom_ops import cpu_prepack_moe_weight

_BLOCKS, _GROUPS = (16, 32, 64, 8, 4, 1), (1, 2, 4, 8)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class KernelOrder:
    """Where a kernel keeps the entries of a matrix."""

    columns: int  #: of the matrix
    block: int  #: b
    group: int  #: g

    def write(self, memory: torch.Tensor, first_row: int, first_column: int, values: torch.Tensor) -> None:
        """Put entries where they belong.

        Args:
            memory: [rows * columns] as the kernel keeps them.
            values: [r, c] entries of the rows and columns from the first ones on, of the same dtype.
        """
        if self._divides(memory, first_column, values.shape[1]):
            for place, part in self._strips(memory, first_row, first_column, values):
                place.copy_(part)
        else:
            memory[self.places(first_row, first_column, *values.shape)] = values

    def read(self, memory: torch.Tensor, first_row: int, first_column: int, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] entries from the first row and column on; see `write`."""
        if not self._divides(memory, first_column, columns):
            return memory[self.places(first_row, first_column, rows, columns)]
        values = torch.empty(rows, columns, dtype=memory.dtype)
        for place, part in self._strips(memory, first_row, first_column, values):
            part.copy_(place)
        return values

    def _divides(self, memory: torch.Tensor, first_column: int, columns: int) -> bool:
        """Whether groups of columns can be moved as one wider number."""
        return not (first_column % self.group or columns % self.group) and memory.element_size() * self.group in _INTEGERS

    def _strips(
        self, memory: torch.Tensor, first_row: int, first_column: int, values: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of views, of the memory and of the values, which lie alike and together are all values."""
        (rows, columns), group = values.shape, self.group
        wide = _INTEGERS[memory.element_size() * group]
        blocks = memory.view(wide).view(-1, self.columns // group, self.block)
        numbers, first = values.view(wide), first_column // group
        found, row = [], 0
        while row < rows:
            number, within = divmod(first_row + row, self.block)
            whole = 0 if within else (rows - row) // self.block
            count = whole * self.block or min(self.block - within, rows - row)
            part, there = numbers[row : row + count], blocks[number : number + max(whole, 1), first : first + columns // group]
            if whole:  # in one go, at half the speed of a plain copy; block by block it is a fifth
                found.append((there, part.unflatten(0, (whole, self.block)).transpose(1, 2)))
            else:
                found.append((there[0, :, within : within + count], part.t()))
            row += count
        return found

    def places(self, first_row: int, first_column: int, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] the place of each entry from the first row and column on."""
        r = torch.arange(first_row, first_row + rows)[:, None]
        c = torch.arange(first_column, first_column + columns)
        b, g = self.block, self.group
        return r // b * (b * self.columns) + c // g * (g * b) + r % b * g + c % g


@lru_cache(maxsize=16)
def find_order(rows: int, columns: int, dtype: torch.dtype, isa: str) -> KernelOrder:
    """The order in which vLLM's `cpu_prepack_moe_weight` puts a matrix.

    Args:
        isa: the kernel's, as vLLM names it.

    Raises:
        RuntimeError: it is another one than this module knows.
    """
    packed = _pack_positions(rows, columns, dtype, isa)
    candidates = [KernelOrder(columns, b, g) for b in _BLOCKS for g in _GROUPS if rows % b == columns % g == 0]
    for looked_at in (1, rows):  # most fail in the first row
        wanted = torch.arange(looked_at * columns).view(looked_at, columns)
        candidates = [order for order in candidates if torch.equal(packed[order.places(0, 0, looked_at, columns)], wanted)]
    if not candidates:
        raise RuntimeError(f"the order in which [{rows}, {columns}] {dtype} is packed for {isa} is unknown")
    return candidates[0]


def _pack_positions(rows: int, columns: int, dtype: torch.dtype, isa: str) -> torch.Tensor:
    """[rows * columns] the position in the matrix of each entry as the kernel keeps them; 16-bit types carry it in two halves."""
    position = torch.arange(rows * columns)
    integer, bits = (torch.int32, 31) if dtype.itemsize == 4 else (torch.int16, 15)
    packed = torch.zeros_like(position)
    for shift in range(0, 31, bits):
        digits = ((position >> shift) & ((1 << bits) - 1)).to(integer).view(dtype).view(1, rows, columns)
        packed |= cpu_prepack_moe_weight(digits, isa).view(integer).flatten().long() << shift
    return packed
