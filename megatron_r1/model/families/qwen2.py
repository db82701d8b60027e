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


FAMILY = Qwen2
PRESETS = {
    # A dense student for the tiny model's data.
    "tiny_qwen2": Qwen2(
        vocab_size=640, hidden_size=96, num_hidden_layers=3, intermediate_size=256, num_attention_heads=3, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=1024, rope_theta=100.0, tie_word_embeddings=True, init_std=0.08,
    ),
}  # fmt: skip
