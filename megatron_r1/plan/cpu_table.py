"""A plan of memory on CPUs as a table: of the fullest rank's process, and of a machine."""

from __future__ import annotations

from megatron_r1.plan.memory_cpu import CpuMemoryPlan
from megatron_r1.plan.table import terms_table


def describe_cpu_memory(plan: CpuMemoryPlan) -> str:
    """Both tables, the engine's room, and what does not fit."""
    lines, room = [], plan.node_bytes
    if any(phase.device for phase in plan.phases):
        lines.append(f"\nresident memory of the process of the rank that needs most, GB; the machine has {room / 1e9:,.1f}")
        lines += terms_table(plan.phases, [phase.device for phase in plan.phases], room)
    lines.append(f"\nof all processes of a machine, GB; it has {room / 1e9:,.1f}, and the system needs some of it")
    lines += terms_table(plan.phases, [phase.host for phase in plan.phases], room)
    if plan.engine is not None:
        cache, count = plan.engine.cache / 1e9, plan.engine.sequences
        lines.append(f"\nengine: {cache:,.2f} GB of cache, room for {count:,} sequences of the longest kind")
    problems = plan.shortfalls()
    lines.append("\nfits; times are planned for devices alone (--gpu NAME)" if not problems else f"\ndoes not fit: {problems[0]}")
    return "\n".join(lines)
