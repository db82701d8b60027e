"""Settings of the model and of its layout over ranks: the sections `model` and `parallel`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_r1.config.section import MAY_CHANGE, Section


class ModelConfig(Section):
    """Which architecture, and where its weights come from."""

    preset: str = Field(
        "tiny",
        description="Name of the architecture of a model that starts with random weights, e.g. tiny, 16b or 671b; the error for "
        "an unknown name lists all. The preset is ignored if model.weights names a folder.",
    )
    overrides: dict[str, Any] = Field(
        {},
        description="Fields of a Hugging Face config.json that replace those of the preset, e.g. "
        "model.overrides.num_hidden_layers=4.",
    )
    weights: str | None = Field(
        None,
        description="Folder of the weights to start from: a Hugging Face folder, a converted folder, a checkpoint or a run. null: "
        "random weights of model.preset.",
    )


class ParallelConfig(Section):
    """How the model is laid out over ranks. Data parallelism is what is left of the number of ranks."""

    tp: int = Field(
        1,
        gt=0,
        description="Tensor parallelism: the number of ranks that share every layer's matrices.",
        json_schema_extra=MAY_CHANGE,
    )
    pp: int = Field(
        1,
        gt=0,
        description="Pipeline parallelism: the number of groups of ranks that hold consecutive layers each. DeepSeek-V3 was "
        "pretrained with 16 (V3 section 3.2).",
        json_schema_extra=MAY_CHANGE,
    )
    vpp: int = Field(
        1,
        gt=0,
        description="Virtual pipeline stages of a rank, for Megatron-Core's interleaved schedule. 1: the plain schedule.",
        json_schema_extra=MAY_CHANGE,
    )
    ep: int = Field(
        1,
        gt=0,
        description="Expert parallelism: the number of ranks that share the experts of a layer. DeepSeek-V3 was pretrained with "
        "64 (V3 section 3.2).",
        json_schema_extra=MAY_CHANGE,
    )
    etp: int | None = Field(
        None,
        description="Tensor parallelism inside an expert, in ranks. null: that of parallel.tp if parallel.ep is 1, else 1.",
        json_schema_extra=MAY_CHANGE,
    )
    cp: int = Field(
        1,
        gt=0,
        description="Context parallelism: the number of ranks that share a sequence. Outside pretraining each sequence of a packed "
        "micro-batch is padded to a multiple of 2 x cp tokens.",
        json_schema_extra=MAY_CHANGE,
    )
    sequence_parallel: bool | None = Field(
        None,
        description="Whether tensor-parallel ranks also share the activations between layers. null: yes if parallel.tp is above 1.",
        json_schema_extra=MAY_CHANGE,
    )
