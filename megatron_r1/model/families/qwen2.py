"""Qwen2.5, students of R1's distillation. Sources: the published config.json files and transformers' `Qwen2ForCausalLM`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from megatron_r1.model.grouped_query import GroupedQueryArchitecture


class Qwen2(GroupedQueryArchitecture):
    """Qwen2.5 of all sizes; the small ones tie embedding and output layer."""

    HF_CLASS: ClassVar[str] = "Qwen2ForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False}
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32}
    QKV_BIAS: ClassVar[bool] = True

    model_type: Literal["qwen2"] = "qwen2"

    def vllm_refusal(self) -> str | None:
        """The qwen2 of vLLM takes no head_dim."""
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            return None
        width = self.hidden_size / self.num_attention_heads
        return (
            f"the model's head_dim={self.head_dim} is not hidden_size / num_attention_heads = {width:g}, "
            "which vLLM builds qwen2 with"
        )


def _of_size(hidden: int, width: int, layers: int, heads: int, groups: int, *, vocabulary: int, tied: bool = False) -> Qwen2:
    return Qwen2(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=tied,
    )  # fmt: skip


FAMILY = Qwen2
PRESETS = {
    # A dense student for the tiny model's data.
    "tiny_qwen2": Qwen2(
        vocab_size=640, hidden_size=96, num_hidden_layers=3, intermediate_size=256, num_attention_heads=3, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=1024, rope_theta=100.0, tie_word_embeddings=True, init_std=0.08,
    ),
    # Qwen2.5-0.5B, 1.5B and 7B (config.json; arXiv 2412.15115, table 1) with the positions of the Instruct models: the config.json
    # of the base models of 1.5B and 7B says 131,072.
    "qwen2.5_0.5b": _of_size(896, 4864, 24, 14, 2, vocabulary=151936, tied=True),
    "qwen2.5_1.5b": _of_size(1536, 8960, 28, 12, 2, vocabulary=151936, tied=True),
    "qwen2.5_7b": _of_size(3584, 18944, 28, 28, 4, vocabulary=152064),
    # The published students (R1 v2 B.4.3): Qwen2.5-Math-1.5B and 7B, Qwen2.5-14B and 32B. The two of Math with the positions of
    # R1-Distill-Qwen: their own config.json says 4,096, fewer than what they are trained on.
    "qwen2.5_math_1.5b": Qwen2(
        vocab_size=151936, hidden_size=1536, num_hidden_layers=28, intermediate_size=8960, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=131072, rope_theta=10000.0, tie_word_embeddings=True,
    ),
    "qwen2.5_math_7b": Qwen2(
        vocab_size=152064, hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, rope_theta=10000.0,
    ),
    "qwen2.5_14b": Qwen2(
        vocab_size=152064, hidden_size=5120, num_hidden_layers=48, intermediate_size=13824, num_attention_heads=40,
        num_key_value_heads=8, max_position_embeddings=131072, rope_theta=1000000.0, rms_norm_eps=1e-5,
    ),
    "qwen2.5_32b": Qwen2(
        vocab_size=152064, hidden_size=5120, num_hidden_layers=64, intermediate_size=27648, num_attention_heads=40,
        num_key_value_heads=8, max_position_embeddings=131072, rope_theta=1000000.0, rms_norm_eps=1e-5,
    ),
}  # fmt: skip
