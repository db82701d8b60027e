"""A checksum of a tensor's exact bits that shards can compute for themselves.

The tensor is seen as a matrix of rows (axis 0) and columns (all other axes), and every element's bits b(r, c) as an integer:

    checksum = sum over r, c of  b(r, c) * row_weight(r) * column_weight(c)   mod 2^64

All weights are odd, so a change of any single element changes the sum; they are mixed from the index, so moved or swapped
elements change it too. The sum is the same on every device, and over the shards of a tensor the checksums add up.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import xxhash

MASK = (1 << 64) - 1
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Elements widened to 64 bits at a time: on a CPU so few that they stay in its cache, elsewhere so many that launches cost nothing.
_BLOCK_ON_CPU, _BLOCK = 1 << 17, 1 << 22
_ROW_SALT, _COLUMN_SALT = 0x1234567, 0x7654321


def checksum(tensor: torch.Tensor, row_offset: int = 0, column_offset: int = 0) -> int:
    """Checksum of a tensor, or of its shard that starts at a row and column of the whole.

    Args:
        tensor: any shape and dtype; one-dimensional tensors have one column.
        row_offset: index of the shard's first row in the whole tensor's axis 0.
        column_offset: index of the shard's first column among the whole tensor's flattened other axes.

    Returns:
        An integer in [0, 2^64). Checksums of shards that tile a tensor add up, mod 2^64, to the tensor's.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    bits = bits.reshape(bits.shape[0] if bits.ndim else 1, -1)
    rows, columns = bits.shape
    row_weights = _odd_weights(row_offset + rows, _ROW_SALT, bits.device)[row_offset:]
    column_weights = _odd_weights(column_offset + columns, _COLUMN_SALT, bits.device)[column_offset:]
    total = 0
    step = max(1, (_BLOCK_ON_CPU if bits.is_cpu else _BLOCK) // max(columns, 1))
    for start in range(0, rows, step):
        per_row = (bits[start : start + step] * column_weights).sum(1)  # in 64 bits, as the weights are
        total += int((per_row * row_weights[start : start + step]).sum())
    return total & MASK


def shard_checksum(shard: torch.Tensor) -> int:
    """Checksum of the bits of a shard by itself, wherever in its tensor it stands: an integer in [0, 2^64).

    Two that are compared must be of the same kind of device. On a CPU it is XXH3, at the speed of memory; elsewhere `checksum`.
    """
    if not shard.is_cpu:
        return checksum(shard)
    return xxhash.xxh3_64_intdigest(shard.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@lru_cache(maxsize=64)
def _odd_weights(count: int, salt: int, device: torch.device) -> torch.Tensor:
    """[count] odd 64-bit integers, mixed from the index by the finaliser of MurmurHash3."""
    x = torch.arange(count, dtype=torch.int64, device=device) + salt
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> 33)) * (multiplier - (1 << 64))
    return (x ^ (x >> 33)) | 1
