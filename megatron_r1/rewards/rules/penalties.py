"""Optional penalties, off by default: the recipe has neither. Each is a score in [-1, 0], which is multiplied by its weight."""

from __future__ import annotations

from collections.abc import Sequence


def length_penalty(length: int, max_tokens: int, cache_tokens: int) -> float:
    """Soft punishment of overlong responses (DAPO, arXiv 2503.14476, equation 13).

    0 up to `max_tokens - cache_tokens`, then falling linearly to -1 at `max_tokens`, and -1 beyond.

    Args:
        length: of the response in tokens.
    """
    over = length - (max_tokens - cache_tokens)
    return -min(1.0, max(0.0, over / cache_tokens))


def repetition_penalty(token_ids: Sequence[int], ngram: int) -> float:
    """Minus the share of n-grams that occurred earlier in the response: 0 without repetition, near -1 for one phrase for ever.

    1 - |distinct n-grams| / |n-grams|, negated; 0 for a response shorter than `ngram` tokens.
    """
    ngrams = [tuple(token_ids[start : start + ngram]) for start in range(len(token_ids) - ngram + 1)]
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0
