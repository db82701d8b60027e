"""Near-duplicates by MinHash (Broder 1997) with locality-sensitive hashing, in time linear in the amount of text.

The signature of a text holds, for each of K hash functions, the least hash over the text's word n-grams. Two signatures agree in a
share of their places that estimates the Jaccard similarity J of the two sets of n-grams, with a standard error of at most
1/(2 sqrt(K)). Signatures are cut into bands; only texts that agree in a whole band are compared.
"""

from __future__ import annotations

import numpy as np
import xxhash

from megatron_r1.config.curation import DedupConfig
from megatron_r1.curation.words import hash_ngrams, words_of

_RECALL = 0.95  # probability that two texts as similar as the threshold are compared
_PIECE = 4096  # n-grams hashed at once, which bounds the memory
_ENTRY, _KEY = 240, 140  # bytes of Python's objects and tables: of a kept text, and of its key in a band, measured
_BUCKET = 8  # texts with which a new one is compared per band: bounds the time if many texts are somewhat alike


class Signer:
    """Makes signatures. The same settings and seed give the same signatures in any process."""

    def __init__(self, config: DedupConfig, seed: int) -> None:
        self._ngram = config.ngram
        random = np.random.default_rng(seed % 2**64)
        shape = (config.permutations, 1)
        # multiply-add-shift (Dietzfelbinger 1996): a family of hash functions from 64 to 32 bits
        self._factors = random.integers(1, 2**64, shape, dtype=np.uint64) | np.uint64(1)
        self._terms = random.integers(0, 2**64, shape, dtype=np.uint64)

    def sign(self, text: str) -> np.ndarray:
        """The signature, [permutations] uint32. A text shorter than an n-gram is one n-gram by itself."""
        words = words_of(text)
        ngrams = hash_ngrams(words, min(self._ngram, max(len(words), 1)))
        if not ngrams.size:  # no word at all: only the same text is a duplicate
            ngrams = np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))], np.uint64)
        ngrams = np.unique(ngrams)
        least = np.full(len(self._factors), 0xFFFFFFFF, np.uint32)
        for start in range(0, ngrams.size, _PIECE):
            hashes = (self._factors * ngrams[start : start + _PIECE] + self._terms) >> np.uint64(32)
            np.minimum(least, hashes.min(axis=1).astype(np.uint32), out=least)
        return least


class NearDuplicates:
    """Takes signatures one after the other and finds those that repeat an earlier one that was kept. About 4 KB a text."""

    def __init__(self, config: DedupConfig) -> None:
        self._threshold = config.threshold
        self._rows = _rows_per_band(config.permutations, config.threshold)
        self._bands = config.permutations // self._rows
        self._buckets: list[dict[bytes, tuple[int, ...]]] = [{} for _ in range(self._bands)]
        self._kept: dict[int, np.ndarray] = {}

    def find(self, index: int, signature: np.ndarray) -> tuple[int, float] | None:
        """The kept text that this one repeats, with the estimated similarity; None if it is new; it is kept from now on.

        Args:
            index: a number for the text, by which later calls name it.
        """
        keys = [signature[band * self._rows : (band + 1) * self._rows].tobytes() for band in range(self._bands)]
        found = [bucket.get(key, ()) for bucket, key in zip(self._buckets, keys)]
        for other in dict.fromkeys(known for bucket in found for known in bucket):
            similarity = float((self._kept[other] == signature).mean())
            if similarity >= self._threshold:
                return other, similarity
        self._kept[index] = signature
        for bucket, key, known in zip(self._buckets, keys, found):
            if len(known) < _BUCKET:
                bucket[key] = (*known, index)
        return None


def dedup_memory(config: DedupConfig, texts: int) -> int:
    """Bytes that `NearDuplicates` takes for so many kept texts: a signature, and in each band a key in a table of Python.

    At 128 permutations some 4 KB a text from a similarity of 0.8, 7 KB from 0.5. A billion texts need a machine of 4 TB, or shards
    that are compared each by itself.
    """
    bands = config.permutations // (rows := _rows_per_band(config.permutations, config.threshold))
    return texts * (4 * config.permutations + _ENTRY + bands * (4 * rows + _KEY))


def _rows_per_band(permutations: int, threshold: float) -> int:
    """The longest bands with which two texts of this similarity still meet in one with probability `_RECALL`.

    P(meet) = 1 - (1 - J^r)^b, with b bands of r rows.
    """
    recall = [1 - (1 - threshold**rows) ** (permutations // rows) for rows in range(1, permutations + 1)]
    return max((rows for rows, share in enumerate(recall, start=1) if share >= _RECALL), default=1)
