"""Settings of the model and of its layout over ranks: the sections `model` and `parallel`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_r1.config.section import MAY_CHANGE, Section


class ModelConfig(Section):
    """Which architecture, and where its weights come from."""

    preset: str = Field("tiny", description="tiny, tiny_qwen2, small, 16b or 671b; ignored when `weights` names a folder")
    overrides: dict[str, Any] = Field({}, description="fields of the Hugging Face config.json that replace the preset's")
    weights: str | None = Field(None, description="Hugging Face folder, converted folder, checkpoint or run to start from")


class ParallelConfig(Section):
    """How the model is laid out over ranks. Data parallelism is what is left of the world size."""

    tp: int = Field(1, gt=0, description="tensor parallel", json_schema_extra=MAY_CHANGE)
    pp: int = Field(1, gt=0, description="pipeline parallel", json_schema_extra=MAY_CHANGE)
    vpp: int = Field(1, gt=0, description="virtual pipeline stages per rank (interleaved schedule)", json_schema_extra=MAY_CHANGE)
    ep: int = Field(1, gt=0, description="expert parallel", json_schema_extra=MAY_CHANGE)
    etp: int | None = Field(
        None, description="tensor parallel inside experts; default: tp without ep, else 1", json_schema_extra=MAY_CHANGE
    )
    cp: int = Field(1, gt=0, description="context parallel", json_schema_extra=MAY_CHANGE)
    sequence_parallel: bool | None = Field(None, description="default: on when tp > 1", json_schema_extra=MAY_CHANGE)
