"""Llama 2, 3, 3.1, 3.2 (text) and 3.3, students of R1's distillation, and models of other names that are published as `llama`.

Sources: the published config.json files and transformers' `LlamaForCausalLM`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from megatron_r1.model.grouped_query import GroupedQueryArchitecture


class Llama(GroupedQueryArchitecture):
    """No biases; Llama 3.1 and later scale RoPE by wavelength."""

    HF_CLASS: ClassVar[str] = "LlamaForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

    model_type: Literal["llama"] = "llama"


FAMILY = Llama
