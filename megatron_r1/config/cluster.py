"""Settings that a job on many machines needs and a single process hardly notices."""

from __future__ import annotations

from pydantic import Field

from megatron_r1.config.section import Section


class HeartbeatConfig(Section):
    """How ranks notice that one of them hangs. Each writes a sign of life into <run_dir>/health, and each watches the next one's."""

    interval_seconds: float = Field(5.0, gt=0, description="between two signs of life of a rank")
    lost_seconds: float = Field(
        120.0, gt=0, description="a rank without a sign of life for so long is lost: all write their stacks and leave"
    )
    stall_seconds: float = Field(
        10800.0, gt=0, description="the same for a rank that lives but begins nothing new; above rollout.step_timeout_seconds"
    )
