"""What every architecture has, as plain data. Field names are those of the Hugging Face `config.json`.

A family is one file in `families/`: a subclass of `Architecture` that says everything about a `model_type`. The other packages ask
the architecture what they need to know, and none of them knows a family by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_r1.model.rope import read_rope
from megatron_r1.model.rows import Block, Row, Split, norm_row, swiglu_rows

SCORE_HEAD = "score.weight"  #: a reward model's head in transformers' classifiers
OUTPUT_LAYER = "lm_head.weight"
_LANGUAGE_MODEL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"  # how transformers' class names end

# Upper bounds of what config.json may say, some ten times what the largest published models have: a number with a slipped digit
# is named at once, before a table of that many tensors is made or memory is taken.
MOST_LAYERS, MOST_HEADS, MOST_EXPERTS, MOST_WIDTH, MOST_VOCABULARY = 1024, 4096, 8192, 1 << 20, 1 << 22
_MOST_EXPERT_LAYERS = 1 << 16
_MOST_POSITIONS = 1 << 24


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture-of-experts layer."""

    count: int  #: routed ones
    width: int  #: of the feed-forward of one
    per_token: int  #: to how many a token is sent
    shared_width: int = 0  #: of all shared experts together; 0: there are none


@dataclass(frozen=True)
class RouterRule:
    """What Megatron-Core's router has no setting for."""

    best_of_group: int | None = None  #: experts whose scores are a group's; None: as Megatron-Core counts, or there are no groups
    normalize_one: bool = False  #: the weight of the one expert of a token is the scaling factor, whatever its score


class Architecture(BaseModel):
    """Shape of a model; nothing about how it is trained or laid out over devices.

    A subclass is one `model_type`. Unless a family says otherwise, a model is dense and has no multi-token prediction, every norm
    is an RMSNorm and every feed-forward a SwiGLU without biases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    HF_CLASS: ClassVar[str]  #: "architectures" of config.json
    HF_FIXED: ClassVar[dict[str, Any]] = {}  #: fields of config.json that have one value only in what this project builds
    ATTENTION: ClassVar[Literal["grouped_query", "latent"]]  #: which attention module Megatron-Core and vLLM build
    #: What transformers takes for a field that config.json lacks, where this class has another default.
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {}
    HF_NULL: ClassVar[dict[str, Any]] = {}  #: what `null` stands for; an optional field without an entry may not be null
    HF_SPELLINGS: ClassVar[dict[str, str]] = {}  #: other names of fields in config.json -> the field
    ALSO_KNOWN_AS: ClassVar[tuple[str, ...]] = ()  #: other values of `model_type` for the same architecture
    HAS_FP8: ClassVar[bool] = False  #: whether folders with block-scaled FP8 weights are published (see `weights/fp8.py`)
    #: Hugging Face tensors that vLLM keeps as one: last part of the name of vLLM's -> those of Hugging Face, in order
    VLLM_FUSED: ClassVar[dict[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    REWARD_MODEL_FIELDS: ClassVar[dict[str, Any]] = {"tie_word_embeddings": False}  #: what a reward model always has

    model_type: str
    vocab_size: int = Field(gt=0, le=MOST_VOCABULARY)
    hidden_size: int = Field(gt=0, le=MOST_WIDTH)
    num_hidden_layers: int = Field(gt=0, le=MOST_LAYERS)
    intermediate_size: int = Field(gt=0, le=MOST_WIDTH, description="dense feed-forward width")
    num_attention_heads: int = Field(gt=0, le=MOST_HEADS)
    max_position_embeddings: int = Field(gt=0, le=_MOST_POSITIONS)
    rope_theta: float = Field(10000.0, gt=0, allow_inf_nan=False)
    rms_norm_eps: float = Field(1e-6, gt=0, lt=1)
    tie_word_embeddings: bool = False
    init_std: float = Field(0.006, gt=0, description="V3 section 4.2; the 0.02 in the published config.json is not it")
    score_label: str | None = Field(None, description="a reward model, and what its one number says; None: a language model")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.experts is not None and self.experts.count * self.num_hidden_layers > _MOST_EXPERT_LAYERS:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} with {self.experts.count} experts each are more than "
                f"{_MOST_EXPERT_LAYERS:,} experts"
            )
        return self

    # What a family says of its shape.

    @property
    def experts(self) -> Experts | None:
        """None: every layer is dense."""
        return None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward of a layer, counted from 0, is made of experts."""
        return False

    @property
    def query_groups(self) -> int:
        """Key and value heads: as many as query heads, or fewer, each for a group of query heads."""
        return self.num_attention_heads

    @abstractmethod
    def head_widths(self) -> tuple[int, int]:
        """Width of a head's query and key, and of its value."""

    @property
    @abstractmethod
    def cached_width(self) -> int:
        """Values that a KV cache keeps of one token in one layer."""

    @property
    def mtp_depth(self) -> int:
        """Layers of multi-token prediction."""
        return 0

    # For Megatron-Core.

    @abstractmethod
    def megatron_settings(self) -> dict[str, Any]:
        """Fields of Megatron-Core's TransformerConfig of this family; they replace those of `mcore/transformer_config.py`."""

    def megatron_refusal(self) -> str | None:
        """Why Megatron-Core does not compute this model, naming the field and what to do; None: it does."""
        return None

    def router_rule(self) -> RouterRule:
        """How the router differs from what Megatron-Core can be set to."""
        return RouterRule()

    def rope_wavelength_scaling(self) -> dict[str, Any] | None:
        """Arguments of Megatron-Core's scaling of RoPE by wavelength, as Llama 3's; None: no such scaling."""
        return None

    def yarn_scaling(self) -> dict[str, Any] | None:
        """YaRN of grouped-query attention, fields of `rope.YarnScaling`; None: no such scaling. Latent attention has its own."""
        return None

    def split_sizes(self) -> dict[str, dict[str, int]]:
        """Sizes that a layout must divide: kind of parallelism ("tp", "ep", "etp") -> name in messages -> size.

        Not the vocabulary's: it is padded.
        """
        tensor = {
            "num_attention_heads": self.num_attention_heads, "num_key_value_heads": self.query_groups,
            "intermediate_size": self.intermediate_size, "hidden_size": self.hidden_size,
        }  # fmt: skip
        return {"tp": tensor, "ep": {}, "etp": {}}

    # Names and shapes of the weights.

    @abstractmethod
    def attention_rows(self) -> tuple[Row, ...]:
        """The weights of a layer before its feed-forward, both norms included."""

    def feed_forward_rows(self, layer: int) -> tuple[Row, ...]:
        """The weights of a layer's feed-forward."""
        return swiglu_rows(self.hidden_size, self.intermediate_size)

    def mtp_blocks(self) -> Iterator[Block]:
        """The weights of multi-token prediction."""
        yield from ()

    def embedding_copies(self, name: str) -> tuple[str, ...]:
        """Names under which a folder repeats the embedding or the output layer `name`."""
        return ()

    def blocks(self) -> Iterator[Block]:
        """Every weight of the model once, in streaming order."""
        yield Block("", "", (self._vocabulary_row("embedding.word_embeddings.weight", "model.embed_tokens.weight"),))
        attention = self.attention_rows()
        for n in range(self.num_hidden_layers):
            yield Block(f"decoder.layers.{n}.", f"model.layers.{n}.", attention + self.feed_forward_rows(n))
        yield from self.mtp_blocks()
        yield Block("", "", (norm_row("decoder.final_layernorm.weight", self.hidden_size, hf="model.norm.weight"),))
        if self.is_reward_model:
            yield Block("", "", (Row(("output_layer.weight",), (SCORE_HEAD,), ((1, self.hidden_size),)),))
        elif not self.tie_word_embeddings:
            yield Block("", "", (self._vocabulary_row("output_layer.weight", OUTPUT_LAYER),))

    def _vocabulary_row(self, megatron: str, hf: str) -> Row:
        # Tied models have no output layer in Hugging Face; Megatron's last pipeline stage, if it is not the first, holds a copy.
        spellings = (megatron, "output_layer.weight") if self.tie_word_embeddings else (megatron,)
        shape = (self.vocab_size, self.hidden_size)
        surplus = (OUTPUT_LAYER,) if self.tie_word_embeddings else ()
        return Row(spellings, (hf,), (shape,), Split.VOCAB, copies=self.embedding_copies(hf), surplus=surplus)

    # For vLLM.

    def vllm_split_sizes(self) -> dict[str, int]:
        """Sizes that the number of devices of an engine must divide."""
        return {
            "num_attention_heads": self.num_attention_heads, "num_key_value_heads": self.query_groups,
            "intermediate_size": self.intermediate_size, "vocab_size padded to a multiple of 64": -(-self.vocab_size // 64) * 64,
        }  # fmt: skip

    def vllm_refusal(self) -> str | None:
        """Why vLLM would build another model than this one, naming the field; None: it does not."""
        return None

    # Reward models and config.json.

    @property
    def is_reward_model(self) -> bool:
        """A scalar head stands in place of the output layer."""
        return self.score_label is not None

    def as_reward_model(self, label: str) -> Self:
        """The same trunk under a scalar head: nothing to tie to the embedding, no multi-token prediction."""
        return self.model_copy(update={"score_label": label} | self.REWARD_MODEL_FIELDS)

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
        cls._check_class(config)
        for key, want in cls.HF_FIXED.items():
            if config.get(key, want) != want:
                raise ValueError(f"{key} is {config[key]!r}, {cls.HF_CLASS} is built with {want!r} only")
        fields = cls.HF_DEFAULTS | cls._read_fields(config)
        base, kind, numbers = read_rope(config)
        if base is not None:
            fields["rope_theta"] = base
        if kind != "default":
            fields["rope_scaling"] = cls.read_rope_scaling(kind, numbers)
        arch = cls(**fields)
        is_classifier = any(str(name).endswith(_CLASSIFIER) for name in config.get("architectures") or [])
        return arch.as_reward_model(_only_label(config)) if is_classifier else arch

    @classmethod
    def _check_class(cls, config: dict[str, Any]) -> None:
        """Raises ValueError for another class than the language model's or its classifier's, which has other weights."""
        classes = config.get("architectures") or []
        known = (cls.HF_CLASS, cls.HF_CLASS.replace(_LANGUAGE_MODEL, _CLASSIFIER))
        if not isinstance(classes, list) or any(str(name).lower() not in map(str.lower, known) for name in classes):
            raise ValueError(f"architectures is {classes!r}, a {config.get('model_type')} is built as {' or '.join(known)} only")
        layers = config.get("layer_types") or []
        other = sorted({str(kind) for kind in layers} - {"full_attention"}) if isinstance(layers, list) else [str(layers)]
        if other:
            raise ValueError(f"layer_types has {', '.join(other)}, {cls.HF_CLASS} is built with 'full_attention' only")

    @classmethod
    def _read_fields(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of this class that a config has, `rope_*` left out.

        Raises ValueError for values of another kind, which pydantic would convert.
        """
        fields: dict[str, Any] = {}
        named = {**{name: name for name in cls.model_fields}, **cls.HF_SPELLINGS}
        for key, name in named.items():
            if key not in config or name in ("rope_scaling", "rope_theta", "score_label", "init_std", "model_type"):
                continue
            value, field = config[key], cls.model_fields[name]
            if value is None and name in cls.HF_NULL:
                fields[name] = cls.HF_NULL[name]
                continue
            if value is None and not (field.is_required() or field.default is None):
                raise ValueError(f"{key} is null: give the number, or leave it out for {field.default}")
            if value is None:
                continue
            is_text = isinstance(value, str) and not isinstance(field.default, str)
            if is_text or (isinstance(value, bool) and field.annotation is not bool):
                raise ValueError(f"{key} is {value!r}, which is no number")
            if name in fields and fields[name] != value:
                raise ValueError(f"{key} is {value!r} and {name} is {fields[name]!r}: keep the right one")
            fields[name] = value
        return fields

    def as_stored(self, names: Iterable[str]) -> Self:
        """The shape of the model whose tensors have these names, where folders of one config.json differ."""
        return self

    @classmethod
    def read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        """The value of the field `rope_scaling`. Raises ValueError for a kind that the family does not have."""
        model_type = cls.model_fields["model_type"].default
        raise ValueError(f"rope_scaling is of type {kind!r}, {model_type} is built without scaling only")


def _only_label(config: dict[str, Any]) -> str:
    """What the one label of a classifier is called."""
    labels = config.get("id2label") or {}
    if config.get("num_labels", len(labels)) != 1:
        raise ValueError("a reward model has one label, num_labels or id2label says otherwise")
    return str(next(iter(labels.values()), "LABEL_0"))
