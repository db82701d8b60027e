"""Tokenised sources of any size, made in seconds: documents of a stretch that is drawn once and repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

_BLOCK = 4_000_000  # tokens that are drawn
_SHORTEST, _LONGEST = 50, 2000  # tokens of a document


def write_source(prefix: Path, tokens: int, *, vocab_size: int, eos_id: int, seed: int) -> int:
    """Write PREFIX.bin and PREFIX.idx as Megatron lays them out.

    Args:
        tokens: that it has at least; it ends with a whole stretch.
        vocab_size: ids are drawn below it; at most 65,536.
        eos_id: the last token of every document, and of nothing else.
        seed: of lengths and tokens.

    Returns:
        Tokens that it has.
    """
    from megatron_r1.mcore.index_writer import write_token_index

    random = np.random.default_rng(seed)
    wanted = min(tokens, _BLOCK)
    lengths = random.integers(_SHORTEST, _LONGEST + 1, size=wanted // _SHORTEST + 1, dtype=np.int64)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), wanted)) + 1]
    block = random.integers(0, vocab_size - 1, size=int(lengths.sum()), dtype=np.uint16)
    block[block >= eos_id] += 1
    block[lengths.cumsum() - 1] = eos_id
    repeats = -(-tokens // len(block))
    with Path(f"{prefix}.bin").open("wb") as file:
        file.writelines(block.tobytes() for _ in range(repeats))

    def of_documents() -> Iterator[np.ndarray]:
        for _ in range(repeats):
            yield lengths

    def of_sequences() -> Iterator[np.ndarray]:
        for _ in range(repeats):
            yield np.ones_like(lengths)

    documents = repeats * len(lengths)
    write_token_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), documents, documents, of_documents, of_sequences)
    return repeats * len(block)
