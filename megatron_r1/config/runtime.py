"""Settings of the processes of a run: the sections `runtime` and `checkpoint`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import MAY_CHANGE, Section


class HeartbeatConfig(Section):
    """How ranks notice that one of them hangs. Each writes a sign of life into <run_dir>/health, and each watches the next one's."""

    interval_seconds: float = Field(5.0, gt=0, description="between two signs of life of a rank", json_schema_extra=MAY_CHANGE)
    lost_seconds: float = Field(
        120.0,
        gt=0,
        description="a rank without a sign of life for so long is lost: all write their stacks and leave",
        json_schema_extra=MAY_CHANGE,
    )
    stall_seconds: float = Field(
        10800.0,
        gt=0,
        description="the same for a rank that lives but begins nothing new; above rollout.step_timeout_seconds",
        json_schema_extra=MAY_CHANGE,
    )


class RuntimeConfig(Section):
    """Device and numerics."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: int = Field(1, gt=0, description="OpenMP threads per process on CPU", json_schema_extra=MAY_CHANGE)
    recompute: Literal["none", "full", "selective"] = Field("none", description="activation recomputation")
    recompute_modules: list[str] = Field(["layernorm", "mla_up_proj"], description="for selective (V3 section 3.2.3)")
    collective_timeout_seconds: float = Field(
        7200.0,
        gt=0,
        description="a rank waits so long for the others; above what any one of them does alone, as sampling",
        json_schema_extra=MAY_CHANGE,
    )
    heartbeat: HeartbeatConfig = HeartbeatConfig()


class CheckpointConfig(Section):
    """What is kept of a run."""

    interval: int = Field(10, gt=0, description="steps between checkpoints", json_schema_extra=MAY_CHANGE)
    keep: int = Field(2, gt=0, description="newest complete checkpoints kept", json_schema_extra=MAY_CHANGE)
    asynchronous: bool = Field(
        True, description="a forked process writes them while training goes on", json_schema_extra=MAY_CHANGE
    )
