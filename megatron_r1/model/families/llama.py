"""Llama 2, 3, 3.1, 3.2 (text) and 3.3, students of R1's distillation, and models of other names that are published as `llama`.

Sources: the published config.json files and transformers' `LlamaForCausalLM`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from megatron_r1.model.grouped_query import GroupedQueryArchitecture
from megatron_r1.model.rope import Llama3Scaling


class Llama(GroupedQueryArchitecture):
    """No biases; Llama 3.1 and later scale RoPE by wavelength."""

    HF_CLASS: ClassVar[str] = "LlamaForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

    model_type: Literal["llama"] = "llama"


FAMILY = Llama
# The published students (R1 v2 B.4.3): Llama-3.1-8B and Llama-3.3-70B-Instruct.
PRESETS = {
    "llama3.1_8b": Llama(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=Llama3Scaling(), rms_norm_eps=1e-5,
    ),
    "llama3.3_70b": Llama(
        vocab_size=128256, hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=Llama3Scaling(), rms_norm_eps=1e-5,
    ),
}  # fmt: skip
