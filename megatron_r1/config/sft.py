"""Settings of supervised fine-tuning: the section `sft`. "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class SftSource(Section):
    """Conversations to learn from. On the command line a path alone will do."""

    path: str = Field(
        description="Conversations: a .jsonl, .json, .parquet or .csv file (.gz, .zst), a folder of such files, or a folder that "
        "the datasets library wrote with save_to_disk."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Share of an epoch that comes from this source, relative to the weights of the others. null, for all sources: "
        "an epoch takes each sample once.",
    )
    format: Literal["auto", "messages", "sharegpt", "pair", "alpaca", "preference"] = Field(
        "auto",
        description="Form of the records, as data/chat/conversations.py describes it. auto: the fields of a record show its form.",
    )
    split: str = Field("train", description="Name of the split to read, if the folder holds several.")


class SftConfig(Section):
    """Supervised fine-tuning on conversations. Defaults are those of the 800K fine-tuning (R1 v2 B.4.2)."""

    sources: list[SftSource] = Field(
        [],
        description="Conversations to train on: a list of paths, or of {path, weight, format, split}. Empty: the file of "
        "data.source.",
    )
    epochs: int = Field(
        2, gt=0, description="Number of epochs, each with as many samples as all sources together have. R1 v2 B.4.2 states 2."
    )
    batch_size: int = Field(64, gt=0, description="Samples of one update, over all ranks. R1 v2 B.4.2 states 64.")
    micro_batch_tokens: int = Field(
        4096, gt=0, description="Most tokens of one forward pass, into which samples are packed.", json_schema_extra=MAY_CHANGE
    )
    max_tokens: int | None = Field(
        None,
        gt=0,
        description="Most tokens of a sample, see sft.overlong. null: as many as sft.micro_batch_tokens. R1 v2 B.4.2 states "
        "32,768.",
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="What happens to a sample above sft.max_tokens: the run stops, the sample is left out, or its end is cut. "
        "Dropped and truncated samples are counted. The paper does not state it.",
    )
    invalid: Literal["error", "skip"] = Field(
        "error",
        description="What happens to a conversation with a blank message, an unknown role or a field that is not used (images): "
        "the run stops, or the conversation is left out. Skipped conversations are counted.",
    )
    trained_turns: Literal["all", "last"] = Field(
        "all",
        description="Which of a conversation's replies are trained on: all that its fields do not except (weight, train, ...), "
        "or the last alone. The paper does not state it.",
    )
    prompt_field: str = Field("prompt", description="Name of the field that holds the prompt in a record of format pair.")
    response_field: str = Field("response", description="Name of the field that holds the response in a record of format pair.")
    workers: int = Field(
        0,
        ge=0,
        description="Processes that tokenise the conversations before the first step, while the other ranks wait. 0: rank 0 does "
        "it itself.",
        json_schema_extra=MAY_CHANGE,
    )
    validation: SftSource | None = Field(
        None,
        description="Conversations to validate with: a path, or {path, format, split}. null: see sft.validation_fraction.",
        json_schema_extra=MAY_CHANGE,
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the sources that is validated with and not trained on, chosen by a hash of a conversation's first "
        "question. Not together with sft.validation. The paper does not state it.",
    )
    validation_interval: int = Field(
        0,
        ge=0,
        description="Updates between two validations. 0: one before the first update, and one after the last.",
        json_schema_extra=MAY_CHANGE,
    )
    validation_samples: int = Field(
        512, gt=0, description="Most samples of a validation, chosen by the seed.", json_schema_extra=MAY_CHANGE
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6, min_lr_ratio=0.1, schedule="cosine")
    moe: MoeTrainingConfig = MoeTrainingConfig()

    @field_validator("sources", "validation", mode="before")
    @classmethod
    def _accept_paths(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"path": entry} if isinstance(entry, str) else entry for entry in value]
        return {"path": value} if isinstance(value, str) else value
