"""What finding near-duplicates keeps in memory, and what it must not keep."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from megatron_r1.config.curation import DedupConfig
from megatron_r1.curation.dedup import NearDuplicates, dedup_memory
from megatron_r1.curation.words import _hash_word, hash_ngrams


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_memory_grows_with_kept_texts_as_is_told(threshold):
    config, texts = DedupConfig(threshold=threshold), 1400
    signatures = np.random.default_rng(0).integers(0, 2**32, (texts, config.permutations), dtype=np.uint32)
    tracemalloc.start()
    known = NearDuplicates(config)
    for number, signature in enumerate(signatures):
        assert known.find(number, signature.copy()) is None
    measured = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.75 < measured / dedup_memory(config, texts) < 1.0


def test_a_long_word_is_not_kept_for_the_next_text():
    before = _hash_word.cache_info().currsize
    long = [f"word{n}" + "x" * 10_000 for n in range(20)]
    hashes = hash_ngrams(long, 1)
    assert _hash_word.cache_info().currsize == before
    assert hashes.tolist() == [hash_ngrams([word], 1)[0] for word in long] == [hash_ngrams([word, "b"], 1)[0] for word in long]
