"""Texts as words, and runs of words as numbers, which show near-duplicates and contamination.

A word is a run of letters and digits in lower case. A Chinese character or a Japanese kana is a word by itself, because
no space separates words there. Everything else (space, punctuation, the signs of formulas) is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

_CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_LONGEST_KEPT = 64  # characters
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def words_of(text: str) -> list[str]:
    """The words, in order."""
    return _WORD.findall(text.lower())


def hash_ngrams(words: Sequence[str], n: int) -> np.ndarray:
    """One number for each run of `n` words: [max(0, words - n + 1)] uint64, the same in every process and on every machine."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    # What is kept for the next text must not grow with the text: a word may be a file in base64.
    hash_word = _hash_word if max(map(len, words)) <= _LONGEST_KEPT else _hash_word.__wrapped__
    hashes = np.fromiter(map(hash_word, words), np.uint64, len(words))
    ngrams = hashes[:count].copy()
    for offset in range(1, n):  # a polynomial in the multiplier, modulo 2^64
        ngrams *= _MULTIPLIER
        ngrams += hashes[offset : offset + count]
    # the finalizer of splitmix64: makes every bit depend on every word
    ngrams = (ngrams ^ (ngrams >> np.uint64(30))) * _MIX_1
    ngrams = (ngrams ^ (ngrams >> np.uint64(27))) * _MIX_2
    return ngrams ^ (ngrams >> np.uint64(31))


@lru_cache(maxsize=1 << 18)
def _hash_word(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
