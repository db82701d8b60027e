"""YaRN of grouped-query attention. Pure: no Megatron-Core, whose own takes another way for models without latent attention."""

from __future__ import annotations

import math

import torch


def yarn_frequencies(
    frequencies: torch.Tensor, base: float, factor: float, original_max_position_embeddings: int, beta_fast: float, beta_slow: float
) -> torch.Tensor:
    """[d / 2] frequencies of a head of width d: fast ones kept, slow ones divided by `factor`, those between blended.

    Args:
        frequencies: [d / 2] unscaled, base ** (-2i / d).
        base: of RoPE.
        factor: by which the context grows.
        original_max_position_embeddings: positions before.
        beta_fast: turns within these positions from which a frequency is kept.
        beta_slow: turns up to which it is divided.
    """
    width = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return width * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(beta_fast)), 0), min(math.ceil(dimension(beta_slow)), width - 1)
    span = (high - low) or 0.001
    places = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    divided = ((places - low) / span).clamp(0, 1)
    return frequencies / factor * divided + frequencies * (1 - divided)
