"""Llama 3.1 and 3.3, students of R1's distillation.

Sources: the published config.json files and transformers' `LlamaForCausalLM`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from megatron_r1.model.grouped_query import GroupedQueryArchitecture


class Llama3RopeScaling(BaseModel):
    """Frequencies lowered by wavelength (transformers' `_compute_llama3_parameters`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rope_type: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class Llama(GroupedQueryArchitecture):
    """Llama 3.1 and 3.3."""

    HF_CLASS: ClassVar[str] = "LlamaForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

    model_type: Literal["llama"] = "llama"
    rope_scaling: Llama3RopeScaling | None = None

    def rope_wavelength_scaling(self) -> dict[str, Any] | None:
        """All four numbers; Megatron-Core's own switch would take only the factor."""
        return None if self.rope_scaling is None else self.rope_scaling.model_dump(exclude={"rope_type"})

    @classmethod
    def read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        """Scaling by wavelength only."""
        if kind != "llama3":
            raise ValueError(f"rope_scaling is of type {kind!r}, llama is built with 'llama3' or none only")
        return {**{k: v for k, v in scaling.items() if k in Llama3RopeScaling.model_fields}, "rope_type": kind}


FAMILY = Llama
