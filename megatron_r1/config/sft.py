"""Settings of supervised fine-tuning: the section `sft`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class SftSource(Section):
    """Conversations to learn from. On the command line a path alone will do."""

    path: str = Field(description=".jsonl, .jsonl.gz, .json or .parquet file, a folder of these, or one made by save_to_disk")
    weight: float | None = Field(
        None, gt=0, description="share of an epoch relative to the others'; null for all: each sample once"
    )
    format: Literal["auto", "messages", "sharegpt", "pair", "alpaca", "preference"] = Field(
        "auto", description="of the records, see data/chat/conversations.py; auto: told by their fields"
    )
    split: str = Field("train", description="of a folder that holds several")


class SftConfig(Section):
    """Supervised fine-tuning on conversations (R1: 2 epochs, batch 64, lr 5e-6, cosine to a tenth, 32,768 tokens)."""

    sources: list[SftSource] = Field([], description="paths, or {path, weight, format, split} each; empty: data.source")
    epochs: int = Field(2, gt=0, description="an epoch has as many samples as all sources together")
    batch_size: int = Field(64, gt=0, description="samples per update")
    micro_batch_tokens: int = Field(4096, gt=0, description="packed tokens per forward pass")
    max_tokens: int | None = Field(None, gt=0, description="longest sample; default: micro_batch_tokens")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="what becomes of longer samples (not stated); dropped and truncated ones are counted"
    )
    invalid: Literal["error", "skip"] = Field(
        "error", description="what becomes of conversations with a blank message or an unknown role; skipped ones are counted"
    )
    prompt_field: str = "prompt"
    response_field: str = "response"
    workers: int = Field(
        0,
        ge=0,
        description="processes that tokenise, before the first step, while all ranks but one wait; 0: that rank itself",
        json_schema_extra=MAY_CHANGE,
    )
    validation: SftSource | None = Field(None, description="path, or {path, format, split}, to validate with")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the sources that is validated with instead, by a hash of the first question"
    )
    validation_interval: int = Field(
        0, ge=0, description="updates between validations; 0: only before the first and after the last"
    )
    validation_samples: int = Field(512, gt=0, description="at most this many, chosen by the seed")
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6, min_lr_ratio=0.1, schedule="cosine")
    moe: MoeTrainingConfig = MoeTrainingConfig()

    @field_validator("sources", "validation", mode="before")
    @classmethod
    def _accept_paths(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"path": entry} if isinstance(entry, str) else entry for entry in value]
        return {"path": value} if isinstance(value, str) else value
