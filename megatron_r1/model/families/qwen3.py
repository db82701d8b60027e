"""Dense Qwen3. Sources: the published config.json files, transformers' `Qwen3ForCausalLM`, and the sizes of torchtune's builders.

Against Qwen2.5: an RMSNorm over every head's query and key before RoPE, heads whose width does not follow from the hidden size, and
no biases.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_r1.model.architecture import MOST_HEADS
from megatron_r1.model.grouped_query import GroupedQueryArchitecture


class Qwen3(GroupedQueryArchitecture):
    """Qwen3 from 0.6 to 32 billion parameters; up to 4 billion embedding and output layer are tied."""

    HF_CLASS: ClassVar[str] = "Qwen3ForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32}
    QK_NORM: ClassVar[bool] = True

    model_type: Literal["qwen3"] = "qwen3"
    head_dim: int = Field(128, gt=0, le=MOST_HEADS, description="width of one head")


def _published(hidden: int, width: int, layers: int, heads: int, *, tied: bool = False) -> Qwen3:
    return Qwen3(
        vocab_size=151936, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=tied,
    )  # fmt: skip


FAMILY = Qwen3
PRESETS = {
    # A dense student for the tiny model's data; its heads together are wider than the hidden size.
    "tiny_qwen3": Qwen3(
        vocab_size=640, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=1024, rope_theta=100.0, tie_word_embeddings=True, init_std=0.08,
    ),
    "qwen3_0.6b": _published(1024, 3072, 28, 16, tied=True),
    "qwen3_1.7b": _published(2048, 6144, 28, 16, tied=True),
    "qwen3_4b": _published(2560, 9728, 36, 32, tied=True),
    "qwen3_8b": _published(4096, 12288, 36, 32),
    "qwen3_14b": _published(5120, 17408, 40, 40),
    "qwen3_32b": _published(5120, 25600, 64, 64),
}  # fmt: skip
