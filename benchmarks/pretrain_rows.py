"""What both sides of `pretrain_step` start from: the models and the rows. It imports neither side."""

from __future__ import annotations

from typing import Any, Literal

import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.types import MicroBatch


def shape_config(shape: str, hidden: int, dtype: Literal["fp32", "bf16"], device: str, seed: int) -> Config:
    """A small model of either shape.

    Args:
        shape: `v3`: the tiny preset with every width in proportion to `hidden`, but for attention's latent ranks. `qwen`: a dense
            Qwen3 of 4 layers with the proportions of the published one of 0.6B, and heads of 32.
    """
    overrides: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": hidden // 32}
    if shape == "v3":
        overrides |= {"intermediate_size": 2 * hidden, "moe_intermediate_size": hidden // 2}
    else:
        overrides |= {"intermediate_size": 3 * hidden, "num_key_value_heads": hidden // 64}
    model = ModelConfig(preset={"v3": "tiny", "qwen": "tiny_qwen3"}[shape], overrides=overrides)
    return Config(seed=seed, model=model, runtime=RuntimeConfig(device=device, dtype=dtype, threads=1))


def random_rows(vocab_size: int, rows: int, tokens: int, seed: int) -> MicroBatch:
    """A micro-batch without padding."""
    stream = torch.randint(0, vocab_size, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(tokens).repeat(rows, 1)
    return MicroBatch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), torch.ones(rows, tokens), positions)
