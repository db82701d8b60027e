"""What every architecture has, as plain data. Field names are those of the Hugging Face `config.json`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

_LANGUAGE_MODEL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"  # how transformers' class names end


class Architecture(BaseModel):
    """Shape of a model; nothing about how it is trained or laid out over devices.

    A subclass is one `model_type`. Dense ones answer the questions about experts and multi-token prediction with "none".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    HF_CLASS: ClassVar[str]  #: "architectures" of config.json
    HF_FIXED: ClassVar[dict[str, Any]] = {}  #: fields of config.json that have one value only in what this project builds

    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="dense feed-forward width")
    num_attention_heads: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    init_std: float = Field(0.006, gt=0, description="V3 section 4.2; the 0.02 in the published config.json is not it")
    score_label: str | None = Field(None, description="a reward model, and what its one number says; None: a language model")

    @property
    def is_reward_model(self) -> bool:
        """A scalar head stands in place of the output layer."""
        return self.score_label is not None

    def as_reward_model(self, label: str) -> Self:
        """The same trunk under a scalar head: nothing to tie to the embedding, no multi-token prediction."""
        without = {"tie_word_embeddings": False, "num_nextn_predict_layers": 0}
        return self.model_copy(
            update={"score_label": label} | {name: value for name, value in without.items() if name in type(self).model_fields}
        )

    def to_hf_config(self, bos_token_id: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM load (dtype: "float32" or "bfloat16")."""
        config = self.model_dump(exclude={"init_std", "score_label"})
        head: dict[str, Any] = {"architectures": [self.HF_CLASS]}
        if self.score_label is not None:
            head = {
                "architectures": [self.HF_CLASS.replace(_LANGUAGE_MODEL, _CLASSIFIER)],
                "id2label": {"0": self.score_label}, "label2id": {self.score_label: 0},
            }  # fmt: skip
        return config | self.HF_FIXED | head | {
            "initializer_range": self.init_std, "attention_dropout": 0.0, "use_cache": True,
            "bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "torch_dtype": dtype,
        }  # fmt: skip

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Read a published or exported `config.json` of this `model_type`.

        Raises:
            ValueError: a field that is missing, impossible, or has a value that this architecture does not have.
        """
        for key, want in cls.HF_FIXED.items():
            if config.get(key, want) != want:
                raise ValueError(f"{key} is {config[key]!r}, {cls.HF_CLASS} is built with {want!r} only")
        fields = {k: config[k] for k in cls.model_fields if k in config and config[k] is not None and k != "rope_scaling"}
        parameters = config.get("rope_parameters") or {}  # transformers 5 writes rope_theta and scaling here
        if "rope_theta" not in fields and "rope_theta" in parameters:
            fields["rope_theta"] = parameters["rope_theta"]
        scaling = config.get("rope_scaling") or parameters
        kind = scaling.get("type", scaling.get("rope_type", "default"))
        if kind != "default":
            fields["rope_scaling"] = cls._read_rope_scaling(kind, scaling)
        arch = cls(**{name: value for name, value in fields.items() if name != "score_label"})
        is_classifier = any(str(name).endswith(_CLASSIFIER) for name in config.get("architectures") or [])
        return arch.as_reward_model(_only_label(config)) if is_classifier else arch

    @classmethod
    @abstractmethod
    def _read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        """The value of the field `rope_scaling`. Raises ValueError for a kind that the architecture does not have."""


def _only_label(config: dict[str, Any]) -> str:
    """What the one label of a classifier is called."""
    labels = config.get("id2label") or {}
    if config.get("num_labels", len(labels)) != 1:
        raise ValueError("a reward model has one label, num_labels or id2label says otherwise")
    return str(next(iter(labels.values()), "LABEL_0"))
