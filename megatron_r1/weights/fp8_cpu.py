"""Decoding of FP8 weights on a CPU, where torch converts them number by number, at a tenth of a disk's speed.

A block has one scale, and a code only 256 values: the 256 results of each block are computed beforehand, rounded to the wanted
dtype, and the codes look them up. That is exact whatever the scales are. The loop is compiled by numba, which keeps the machine
code beside this file or in the user's cache folder, and holds no lock while it runs, so that threads that read, hash and write go
on.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch

_BLOCK = 128
_INT = {2: torch.int16, 4: torch.int32}  # bytes of a result -> what carries its bits
_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # code -> value
_SIGNATURES = [numba.void(numba.uint8[::1], bits[::1], *[numba.int64] * 4, bits[::1]) for bits in (numba.int16, numba.int32)]


def decode_fp8(codes: torch.Tensor, scales: torch.Tensor, first_row: int, first_column: int, out: torch.Tensor) -> None:
    """Codes times the scales of their blocks, computed in float32 and rounded once, into `out`. NaN codes give NaN.

    Args:
        codes: [rows, columns] float8_e4m3fn, contiguous.
        scales: [row blocks, column blocks] float32, the blocks that the piece touches.
        first_row: of the piece, counted from the first row of the first block.
        first_column: likewise.
        out: [rows, columns], float32, bfloat16 or float16, contiguous.
    """
    bits = _INT[out.dtype.itemsize]
    tables = (_CODES * scales[:, :, None]).to(out.dtype).view(bits)
    numbers = codes.view(torch.uint8).view(-1).numpy()
    _look_up_codes(numbers, tables.view(-1).numpy(), *codes.shape, first_row, first_column, out.view(bits).view(-1).numpy())


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    try:
        return numba.njit(_SIGNATURES, nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep machine code in: compile in every process
        return numba.njit(_SIGNATURES, nogil=True)(function)


@_compile
def _look_up_codes(codes, tables, rows, columns, first_row, first_column, out):
    blocks = (first_column + columns + _BLOCK - 1) // _BLOCK
    for i in range(rows):
        table = (first_row + i) // _BLOCK * blocks * 256
        start, stop = i * columns, (i + 1) * columns
        end = start + _BLOCK - first_column
        while start < stop:
            end = min(end, stop)
            # Unsigned, or numba counts from the end of the array if an index is negative.
            for j in range(np.uint64(start), np.uint64(end)):
                out[j] = tables[np.uint64(table) + np.uint64(codes[j])]
            start, end, table = end, end + _BLOCK, table + 256
