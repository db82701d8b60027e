"""The DeepSeek-V3 architecture as plain data. Field names are those of the Hugging Face `config.json`.

Source: DeepSeek-V3 technical report (arXiv 2412.19437) sections 2.1 to 2.2 and the published config.json.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeScaling(BaseModel):
    """YaRN, applied to the decoupled RoPE key only (V3 section 4.3: s=40, alpha=1, beta=32)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: str = "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class Architecture(BaseModel):
    """Shape of a deepseek_v3 model; nothing about how it is trained or laid out over devices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str = "deepseek_v3"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    first_k_dense_replace: int = Field(1, ge=0, description="leading layers with a dense feed-forward")
    num_nextn_predict_layers: int = Field(0, ge=0, description="multi-token prediction depth D (V3 section 2.2)")
    intermediate_size: int = Field(gt=0, description="dense feed-forward width")

    num_attention_heads: int = Field(gt=0)
    q_lora_rank: int | None = Field(None, description="query compression; None: a full query projection")
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0, description="decoupled RoPE dimension per head")
    v_head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6

    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(1, ge=0)
    moe_intermediate_size: int = Field(gt=0, description="width of one expert")
    num_experts_per_tok: int = Field(gt=0)
    n_group: int = Field(1, gt=0, description="expert groups of group-limited routing")
    topk_group: int = Field(1, gt=0, description="groups a token may use")
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    init_std: float = Field(0.006, gt=0, description="V3 section 4.2; the 0.02 in the published config.json is not it")

    @model_validator(mode="after")
    def _check(self) -> Architecture:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} does not divide n_routed_experts={self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")
        usable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > usable:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is more than the {usable} experts a token may use")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError("first_k_dense_replace is more than num_hidden_layers")
        if self.tie_word_embeddings:
            raise ValueError("deepseek_v3 with tied embeddings does not exist")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def to_hf_config(self, bos_token_id: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM load (dtype: "float32" or "bfloat16")."""
        config = self.model_dump(exclude={"init_std", "rope_scaling"})
        config.update(
            architectures=["DeepseekV3ForCausalLM"], num_key_value_heads=self.num_attention_heads, hidden_act="silu",
            attention_bias=False, attention_dropout=0.0, moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc",
            rope_interleave=True, initializer_range=self.init_std, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
            torch_dtype=dtype, use_cache=True,
        )  # fmt: skip
        config["rope_scaling"] = self.rope_scaling.model_dump() if self.rope_scaling else None
        return config

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Architecture:
        """Read a published or exported `config.json`.

        Raises:
            ValueError: not a deepseek_v3 config, or a field that this architecture does not have (softmax scores, biases).
        """
        if config.get("model_type") != "deepseek_v3":
            raise ValueError(f"model_type is {config.get('model_type')!r}, only deepseek_v3 is supported")
        fixed = {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "attention_bias": False,
            "moe_layer_freq": 1,
        }
        for key, want in fixed.items():
            if config.get(key, want) != want:
                raise ValueError(f"{key} is {config[key]!r}, this architecture has {want!r}")
        fields = {k: config[k] for k in cls.model_fields if k in config and config[k] is not None}
        scaling = fields.get("rope_scaling")
        parameters = config.get("rope_parameters") or {}  # transformers 5 writes rope_theta and scaling here
        if not scaling and parameters.get("rope_type") == "yarn":
            scaling = parameters
        if "rope_theta" not in fields and "rope_theta" in parameters:
            fields["rope_theta"] = parameters["rope_theta"]
        if scaling:
            known = {k: v for k, v in scaling.items() if k in RopeScaling.model_fields}
            fields["rope_scaling"] = {**known, "type": scaling.get("type", scaling.get("rope_type", "yarn"))}
        return cls(**fields)
