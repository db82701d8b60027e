"""A plan of memory as a table: terms down, phases across, gigabytes of 10^9 bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_r1.conversion.model_shape import FOR_WANT
from megatron_r1.model.size import count_parameters
from megatron_r1.plan.batches import largest_batch
from megatron_r1.plan.job import Job
from megatron_r1.plan.memory import MemoryPlan
from megatron_r1.plan.terms import MemoryPhase, Term
from megatron_r1.plan.traffic import sync_bytes, update_traffic

_SMALL = 0.05e9  #: bytes below which a term has no row of its own


def describe_job(job: Job) -> str:
    """Head of a plan: what is planned, on what."""
    layout = job.layout
    sizes = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp"))
    device = "CPU" if job.device is None else f"{job.device.name} of {job.device.memory_bytes / 1e9:,.1f} GB"
    size = f"{count_parameters(job.arch) / 1e9:,.2f} B parameters"
    source = job.shape_from.replace(FOR_WANT, ", whose folder is not here")
    return "\n".join(
        [
            f"plan of {job.stage}: {job.world_size} rank(s) on {job.nodes} node(s) of {job.devices_per_node} {device}",
            f"model   {job.arch.model_type}, {size}, shape from {source}",
            f"layout  {sizes}",
        ]
    )


def describe_memory(job: Job, plan: MemoryPlan) -> str:
    """Both tables, of a device and of a node, the engine's room, and what does not fit."""
    lines = []
    if any(phase.device for phase in plan.phases):
        lines.append(f"\nmemory of a device, GB, of the pipeline stage that needs most; each has {plan.device_bytes / 1e9:,.1f}")
        lines += terms_table(plan.phases, [phase.device for phase in plan.phases], plan.device_bytes)
        if job.layout.pp > 1:
            lines.append("stage: " + ", ".join(f"{name} {stage}" for name, stage in plan.fullest.items()))
    lines.append(f"\nmemory of a node, GB; each has {plan.node_bytes / 1e9:,.0f}")
    lines += terms_table(plan.phases, [phase.host for phase in plan.phases], plan.node_bytes)
    if plan.engine is not None:
        engine = plan.engine
        asked = job.config.rollout.max_num_seqs
        lines.append(
            f"\nengine: {engine.weights / 1e9:,.1f} GB of weights a device, room for {engine.sequences:,} sequences of the longest "
            f"kind in {max(0.0, engine.cache) / 1e9:,.1f} GB of cache, {engine.sequence / 1e9:,.2f} GB each; "
            f"rollout.max_num_seqs={asked:,}"
        )
    lines += describe_traffic(job, plan)
    problems = plan.shortfalls()
    lines.append("\nfits" if not problems else "\ndoes not fit: " + "\ndoes not fit: ".join(problems))
    return "\n".join(lines)


def describe_traffic(job: Job, plan: MemoryPlan) -> list[str]:
    """What a rank of the stage that is fullest in an update hands over, and what an engine is given."""
    if not job.is_trained:
        return []
    batch, name = largest_batch(job), next(name for name in plan.fullest if name.startswith("update"))
    found = update_traffic(
        job.arch, batch.layout, plan.fullest[name], tokens=batch.tokens, micro_batches=batch.micro_batches, width=job.width,
        recompute=job.runtime.recompute, trains_mtp=job.trains_mtp,
    )  # fmt: skip
    parts = {"gradients": found.gradients, "weights": found.weights, "pipeline": found.pipeline, "experts": found.experts}
    told = ", ".join(f"{part} {amount / 1e9:,.1f}" for part, amount in parts.items())
    lines = [f"\ntraffic of a rank in an update at the limits, GB: {told}"]
    if plan.engine is not None:
        given = sync_bytes(job.arch, "bfloat16" if job.width == 2 else "float32")
        lines.append(f"weights that an engine is given, GB: {given / 1e9:,.1f}")
    return lines


def memory_rows(plan: MemoryPlan) -> list[dict[str, object]]:
    """The same as records, for programs: a phase each, with its terms in bytes."""
    return [
        {
            "phase": phase.name,
            "stage": plan.fullest[phase.name],
            "device_bytes": round(phase.device_bytes),
            "host_bytes": round(phase.host_bytes),
            "device": _records(phase.device),
            "host": _records(phase.host),
        }
        for phase in plan.phases
    ]


def _records(terms: Iterable[Term]) -> list[dict[str, object]]:
    return [{"name": term.name, "bytes": round(term.amount), "setting": term.setting} for term in terms]


def terms_table(phases: Sequence[MemoryPhase], parts: Sequence[Sequence[Term]], room: float) -> list[str]:
    """The lines of a table of the `parts` of phases, in gigabytes, with what they leave of `room` bytes."""
    names = list(dict.fromkeys(term.name for terms in parts for term in terms))
    amounts = {name: [sum(term.amount for term in terms if term.name == name) for terms in parts] for name in names}
    small = [name for name in names if max(amounts[name]) < _SMALL]
    rows = [(name, amounts[name]) for name in names if name not in small]
    if small:
        rows.append(("less than 0.05 each", [sum(amounts[name][i] for name in small) for i in range(len(parts))]))
    totals = [sum(term.amount for term in terms) for terms in parts]
    rows += [("in all", totals), ("left", [room - total if total else 0.0 for total in totals])]
    first = max(len(name) for name, _ in rows)
    titles = [phase.name for phase in phases]
    widths = [max(len(title), 7) for title in titles]
    head = " ".join([" " * first, *(title.rjust(width) for title, width in zip(titles, widths, strict=True))])
    body = [
        " ".join([name.ljust(first), *(_amount_cell(amount, width) for amount, width in zip(values, widths, strict=True))])
        for name, values in rows
    ]
    return [line.rstrip() for line in (head, *body)]


def _amount_cell(amount: float, width: int) -> str:
    return (f"{amount / 1e9:,.1f}" if amount else "-").rjust(width)
