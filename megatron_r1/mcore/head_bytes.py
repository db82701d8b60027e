"""How the output layer's logits are cut into tiles where they are never kept whole, and what that takes: from shapes alone."""

from __future__ import annotations

#: Default of `runtime.whole_logits_mb`.
WHOLE_LOGITS_MB = 256
#: Logits of a tile on a CPU: 256 MiB of float32, 512 rows of a vocabulary of 129,280. Half as many rows go over the weight and its
#: gradient twice as often, which at hidden size 2,048 took a twelfth more of the time.
TILE = 2**26
#: The same on CUDA, in the weights' dtype, where products of a thousand rows and more are as fast as larger ones.
TILE_ON_CUDA = 2**27
#: Logits of a block of a tile on a CPU: 2 MiB of float32, which a core's cache holds.
BLOCK = 2**19
#: Most rows of a tile on a CPU: with more, blocks of few columns make poor matrix products.
ROWS = 512
#: Rows of the weight's gradient whose product is wide at a time on CUDA.
COLUMNS_OF_SUMS = 2**13


def rows_at_a_time(width: int, tokens: int, *, cuda: bool) -> int:
    """Rows of a tile, from the numbers of a row and the rows that there are."""
    most = TILE_ON_CUDA // width if cuda else min(ROWS, TILE // width)
    return max(1, min(most, tokens))


def keeps_whole(logits: int, whole_logits_mb: int) -> bool:
    """Whether logits of so many bytes on a rank are kept, by `runtime.whole_logits_mb`."""
    return logits <= whole_logits_mb * 10**6


def tiles_bytes(hidden: int, width: int) -> int:
    """What tiles take on CUDA, however many tokens there are: one tile, and a part of the weight's gradient in float32.

    Args:
        hidden: numbers of a hidden state.
        width: bytes of a number of the weights.
    """
    return TILE_ON_CUDA * width + COLUMNS_OF_SUMS * hidden * 4
