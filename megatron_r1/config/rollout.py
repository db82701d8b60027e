"""Settings of the rollout engines: the section `rollout`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import MAY_CHANGE, Section


class RolloutConfig(Section):
    """The vLLM engines and what is asked of them."""

    placement: Literal["single", "colocated", "disaggregated"] = Field(
        "single",
        description="single: one engine beside rank 0; colocated: engines_per_node beside the ranks of every node; disaggregated: "
        "those of `megatron-r1 serve-rollouts` on other nodes, weights over the network",
        json_schema_extra=MAY_CHANGE,
    )
    engines_per_node: int = Field(
        1, gt=0, description="colocated; on GPUs each takes its share of tensor_parallel_size", json_schema_extra=MAY_CHANGE
    )
    servers: str | None = Field(
        None, description="folder in which serve-rollouts announces its engines; for disaggregated", json_schema_extra=MAY_CHANGE
    )
    tensor_parallel_size: int = Field(1, gt=0, description="devices of one engine, on all its nodes together")
    nodes_per_engine: int = Field(
        1, gt=0, description="nodes that one engine spans, each with the same share of its devices; colocated or disaggregated"
    )
    max_response_tokens: int = Field(32768, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    kv_cache_bytes: int | None = Field(None, description="KV cache size; default: vLLM's share of the device")
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    max_num_seqs: int = Field(256, gt=0)
    transfer: Literal["auto", "shm", "nccl"] = Field(
        "auto",
        description="how weights travel: shm: through the memory of the node, to other nodes over TCP; nccl: between GPUs, for "
        "disaggregated engines alone, since NCCL takes no two processes on one GPU; auto: nccl where that is possible",
        json_schema_extra=MAY_CHANGE,
    )
    verify_weights: bool = Field(True, description="compare a checksum of every tensor after every update")
    max_logprob_diff_mean: float = Field(1e-4, gt=0, description="trainer against engine, on-policy; above it the run stops")
    max_logprob_diff_max: float = Field(1e-2, gt=0)
    start_timeout_seconds: float = Field(600.0, json_schema_extra=MAY_CHANGE)
    step_timeout_seconds: float = Field(3600.0, json_schema_extra=MAY_CHANGE)
    stall_seconds: float = Field(
        300.0,
        gt=0,
        description="an engine that gives no sign for so long, sampling or taking weights, is replaced as a dead one is",
        json_schema_extra=MAY_CHANGE,
    )
    restarts: int = Field(
        3,
        ge=0,
        description="in a row, after which a lost engine ends the run; only its unfinished groups are sampled anew",
        json_schema_extra=MAY_CHANGE,
    )
