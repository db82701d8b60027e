"""A plan of time as a table: phases down, with their longest parts."""

from __future__ import annotations

from megatron_r1.plan.stage_time import TimePlan

_SHOWN = 4  # parts of a phase, the longest first
_HOUR = 3600


def describe_time(plan: TimePlan, price: float) -> str:
    """The phases of a round or an update, what waits for what, rates and cost.

    Args:
        price: of a device for an hour, in dollars.
    """
    whole = f"the whole {plan.unit}"
    first = max(len(name) for name in (whole, *(phase.name for phase in plan.phases)))
    lines = [f"\ntime of {_one(plan.unit)}, seconds"]
    for phase in plan.phases:
        parts = sorted(phase.terms, key=lambda term: -term.amount)[:_SHOWN]
        shown = ", ".join(f"{term.name} {term.amount:,.2f}" for term in parts)
        waits = f"; after {' and '.join(phase.waits_for)}" if phase.waits_for else ""
        lines.append(f"{phase.name.ljust(first)} {phase.seconds:10,.2f}  {shown}{waits}")
    lines.append(f"{whole.ljust(first)} {plan.seconds:10,.2f}")
    longest = max(plan.phases, key=lambda phase: phase.seconds)
    term = max((term for term in longest.terms if term.setting), key=lambda term: term.amount, default=None)
    if term is not None:
        lines.append(f"longest: {longest.name}; of it {term.name} {term.amount:,.2f} s, which {term.setting} changes")
    lines.append(f"{plan.tokens_per_second:,.1f} tokens/s a device, MFU {plan.mfu:.1%}")
    lines.append(_cost(plan, price))
    lines += [f"with {note}" for note in plan.assumptions]
    return "\n".join(lines)


def _one(unit: str) -> str:
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit}"


def time_record(plan: TimePlan) -> dict[str, object]:
    """The same for programs."""
    return {
        "unit": plan.unit, "seconds": plan.seconds, "devices": plan.devices, "tokens_per_second_device": plan.tokens_per_second,
        "mfu": plan.mfu, "units": plan.units, "stage_seconds": plan.stage_seconds,
        "phases": [
            {
                "phase": phase.name, "seconds": phase.seconds, "waits_for": list(phase.waits_for),
                "parts": [{"name": term.name, "seconds": term.amount, "setting": term.setting} for term in phase.terms],
            }
            for phase in plan.phases
        ],
    }  # fmt: skip


def _cost(plan: TimePlan, price: float) -> str:
    hours = plan.seconds * plan.devices / _HOUR
    text = f"{hours:,.2f} GPU-hours {_one(plan.unit)}"
    if plan.stage_seconds is None or plan.units is None:
        return f"{text}, ${hours * price:,.2f} at ${price:g} a GPU-hour"
    whole = plan.stage_seconds * plan.devices / _HOUR
    return (
        f"{text}; {plan.units:,.0f} of them: {plan.stage_seconds / _HOUR:,.1f} h, {whole:,.0f} GPU-hours, "
        f"${whole * price:,.0f} at ${price:g} a GPU-hour"
    )
