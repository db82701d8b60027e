"""Whether devices and nodes have the memory that a stage needs: what `megatron-r1 plan` says, in a dry run's table."""

from __future__ import annotations

import sys
from typing import cast

from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.dry_run.found import Found, Rows
from megatron_r1.plan.devices import CPU
from megatron_r1.plan.job import Stage, read_job
from megatron_r1.plan.memory import MemoryPlan, plan_memory
from megatron_r1.plan.memory_cpu import plan_cpu_memory


def describe_room(command: str, found: Found) -> Rows:
    """The peak of every phase, as `runtime.plan` wants it.

    Raises:
        ConfigError: with "enforce", one line for the first thing that does not fit.
    """
    choice = found.config.runtime.plan
    if choice == "off":
        return [("room", "memory is not looked at: runtime.plan=off")]
    on_cpus = found.device == "cpu"
    job = read_job(
        found.config, cast(Stage, command), CPU if on_cpus else found.job.gpu, devices_per_node=found.cluster.per_node,
        world_size=found.cluster.world_size,
    )  # fmt: skip
    plan = plan_cpu_memory(job) if on_cpus else plan_memory(job)
    problems = plan.shortfalls()
    if problems and choice == "enforce":
        raise ConfigError(
            f"{command} does not fit: {problems[0]} (runtime.plan=warn goes on; `megatron-r1 plan` has the whole table)"
        )
    for problem in problems:
        print(f"{command} does not fit: {problem}", file=sys.stderr, flush=True)
    if on_cpus:
        room = f"this machine of {plan.node_bytes / 1e9:,.1f} GB"
        return [("room", f"{room}: {', '.join(f'{phase.name} {phase.host_bytes / 1e9:,.1f}' for phase in plan.phases)}")]
    of_device = f"{job.device_name} of {plan.device_bytes / 1e9:,.1f} GB"
    return [("room", f"{of_device}: {phase_peaks(plan)}"), ("", node_peak(plan))]


def phase_peaks(plan: MemoryPlan) -> str:
    """What every phase needs of a device, on one line."""
    return ", ".join(f"{phase.name} {phase.device_bytes / 1e9:,.1f}" for phase in plan.phases if phase.device)


def node_peak(plan: MemoryPlan) -> str:
    """What the fullest phase needs of a node, and how many of the longest responses an engine holds."""
    host = plan.host_peak
    told = f"node of {plan.node_bytes / 1e9:,.0f} GB: {host.name} {host.host_bytes / 1e9:,.0f}"
    if plan.engine is None:
        return told
    return f"{told}; an engine's cache holds {plan.engine.sequences:,} responses of the longest kind"
