"""Dense models with grouped-query attention and SwiGLU: the students of R1's distillation.

Sources: the published config.json files of Qwen2.5 (`qwen2`) and of Llama 3.1 and 3.3 (`llama`), and transformers' models.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_r1.model.architecture import Architecture


class DenseArchitecture(Architecture):
    """What qwen2 and llama share."""

    QKV_BIAS: ClassVar[bool]  #: whether the query, key and value projections have a bias

    num_key_value_heads: int = Field(gt=0, description="query groups of grouped-query attention")
    head_dim: int = Field(gt=0, description="width of one head")

    n_routed_experts: ClassVar[int] = 0
    n_shared_experts: ClassVar[int] = 0
    num_nextn_predict_layers: ClassVar[int] = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        fields = {"num_key_value_heads": heads} | fields
        if fields.get("head_dim") is None and isinstance(heads, int) and heads > 0 and isinstance(hidden, int):
            fields |= {"head_dim": hidden // heads}
        return fields

    @model_validator(mode="after")
    def _check(self) -> DenseArchitecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={self.num_attention_heads}"
            )
        return self

    @property
    def first_k_dense_replace(self) -> int:
        """All layers are dense."""
        return self.num_hidden_layers


class Qwen2(DenseArchitecture):
    """Qwen2.5 of all sizes; the small ones tie embedding and output layer."""

    HF_CLASS: ClassVar[str] = "Qwen2ForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False}
    QKV_BIAS: ClassVar[bool] = True

    model_type: Literal["qwen2"] = "qwen2"

    @classmethod
    def _read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        raise ValueError(f"rope_scaling is of type {kind!r}, qwen2 is built without scaling only")


class Llama3RopeScaling(BaseModel):
    """Frequencies lowered by wavelength (transformers' `_compute_llama3_parameters`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rope_type: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class Llama(DenseArchitecture):
    """Llama 3.1 and 3.3."""

    HF_CLASS: ClassVar[str] = "LlamaForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    QKV_BIAS: ClassVar[bool] = False

    model_type: Literal["llama"] = "llama"
    rope_scaling: Llama3RopeScaling | None = None

    @classmethod
    def _read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        if kind != "llama3":
            raise ValueError(f"rope_scaling is of type {kind!r}, llama is built with 'llama3' or none only")
        return {**{k: v for k, v in scaling.items() if k in Llama3RopeScaling.model_fields}, "rope_type": kind}
