"""A plan as a page: memory of every pipeline stage and phase, the time line of a round, and what it costs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.plan.terms import MemoryPhase, Term
from megatron_r1.report.html import fill_page
from megatron_r1.report.plan_charts import Bar, Palette, draw_bars, draw_time_line, start_times
from megatron_r1.runtime.files import write_atomically

if TYPE_CHECKING:
    from megatron_r1.plan.stage_time import TimePlan  # which imports torch

_GIGA, _HOUR = 1e9, 3600


@dataclass(frozen=True)
class PlanPage:
    """What a page shows."""

    title: str
    head: str  #: lines that say what is planned
    stages: Sequence[Sequence[MemoryPhase]]  #: of each pipeline stage, its phases; the same phases in each
    device_bytes: float  #: that a rank's device has
    node_bytes: float  #: that a node has
    problems: Sequence[str] = ()  #: a line for everything that does not fit
    time: TimePlan | None = None
    price: float = 2.0  #: of a device for an hour, in dollars


def write_plan_page(path: Path, page: PlanPage) -> None:
    """Write the page, one file that opens offline. Raises OSError."""
    write_atomically(path, fill_page(f"megatron_r1: {page.title}", plan_body(page)))


def plan_body(page: PlanPage) -> str:
    """The page without its frame, as HTML."""
    parts = [f"<pre>{html.escape(page.head)}</pre>"]
    parts += [f'<p class="problem">Does not fit: {html.escape(problem)}</p>' for problem in page.problems]
    palette = Palette(_term_names(page))
    parts += _memory_parts(page, palette)
    if page.time is not None:
        parts += _time_parts(page.time, page.price, palette)
    return "\n".join(parts)


def _term_names(page: PlanPage) -> list[str]:
    phases = [phase for stage in page.stages for phase in stage]
    terms = [term for phase in phases for term in (*phase.device, *phase.host)]
    terms += [] if page.time is None else [term for phase in page.time.phases for term in phase.terms]
    return [term.name for term in terms]


def _memory_parts(page: PlanPage, palette: Palette) -> list[str]:
    parts: list[str] = []
    of_phases = list(zip(*page.stages, strict=True))
    if any(phase.device for same in of_phases for phase in same):
        bars = []
        for same in of_phases:
            for stage, phase in enumerate(same):
                name = phase.name if len(same) == 1 else f"{phase.name}, pipeline stage {stage}"
                bars.append(Bar("" if stage else phase.name, name, phase.device))
        each = " A bar for every pipeline stage, the first one above." if len(page.stages) > 1 else ""
        parts += [f"<h2>Memory of a device</h2>\n<p class='note'>Gigabytes of a rank's device, by phase.{each}</p>"]
        parts += [draw_bars(bars, palette, page.device_bytes, _GIGA, "GB"), _legend(bars, palette)]
        fullest = [max(same, key=lambda phase: phase.device_bytes) for same in of_phases]
        parts.append(_phase_table(fullest, [phase.device for phase in fullest]))
    nodes = [max(same, key=lambda phase: phase.host_bytes) for same in of_phases]
    if any(phase.host for phase in nodes):
        bars = [Bar(phase.name, phase.name, phase.host) for phase in nodes]
        parts += ["<h2>Memory of a node</h2>\n<p class='note'>Gigabytes of the node that needs most, by phase.</p>"]
        parts += [draw_bars(bars, palette, page.node_bytes, _GIGA, "GB"), _legend(bars, palette)]
        parts.append(_phase_table(nodes, [phase.host for phase in nodes]))
    return parts


def _legend(bars: Sequence[Bar], palette: Palette) -> str:
    used = {term.name for bar in bars for term in bar.terms}
    items = (
        f'<li><span style="background:{palette.of(name)}"></span>{html.escape(name)}</li>' for name in palette.names if name in used
    )
    return f'<ul class="legend plan">{"".join(items)}</ul>'


def _phase_table(phases: Sequence[MemoryPhase], parts: Sequence[Sequence[Term]]) -> str:
    names = list(dict.fromkeys(term.name for terms in parts for term in terms))
    head = "".join(f"<th>{html.escape(phase.name)}</th>" for phase in phases)
    rows = [(name, [sum(term.amount for term in terms if term.name == name) for terms in parts]) for name in names]
    rows.append(("in all", [sum(term.amount for term in terms) for terms in parts]))
    body = "".join(f"<tr><td>{html.escape(name)}</td>{''.join(map(_gigabyte_cell, amounts))}</tr>" for name, amounts in rows)
    return f"<details><summary>As a table, GB</summary><table><tr><th></th>{head}</tr>{body}</table></details>"


def _gigabyte_cell(amount: float) -> str:
    return f"<td>{amount / _GIGA:,.2f}</td>" if amount else "<td>&ndash;</td>"


def _time_parts(time: TimePlan, price: float, palette: Palette) -> list[str]:
    bars = [Bar(phase.name, phase.name, phase.terms) for phase in time.phases]
    starts = start_times(time.phases)
    rows = "".join(
        f"<tr><td>{html.escape(phase.name)}</td><td>{starts[phase.name]:,.2f}</td><td>{phase.seconds:,.2f}</td></tr>"
        for phase in time.phases
    )
    cost = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in _cost_rows(time, price))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in time.assumptions)
    said = f"Seconds, by phase: each begins when those that it waits for have ended; {time.seconds:,.1f} s in all."
    table = f"<table><tr><th></th><th>begins</th><th>takes</th></tr>{rows}</table>"
    return [
        f"<h2>Time of a {html.escape(time.unit)}</h2>\n<p class='note'>{said}</p>",
        draw_time_line(time.phases, palette),
        _legend(bars, palette),
        f"<details><summary>As a table, seconds</summary>{table}</details>",
        f"<h2>Cost</h2>\n<table class='cost'>{cost}</table>",
        f"<p class='note'>Assumed:</p><ul>{notes}</ul>" if notes else "",
    ]


def _cost_rows(time: TimePlan, price: float) -> list[tuple[str, str]]:
    hours = time.seconds * time.devices / _HOUR
    rows = [
        ("devices", f"{time.devices:,}"),
        ("tokens a second and device", f"{time.tokens_per_second:,.1f}"),
        ("model FLOPS of the devices' peak (MFU)", f"{time.mfu:.1%}"),
        (f"a {time.unit}", f"{hours:,.2f} GPU-hours, ${hours * price:,.2f}"),
    ]
    if time.stage_seconds is not None and time.units is not None:
        whole = time.stage_seconds * time.devices / _HOUR
        rows.append(
            (
                f"the stage, {time.units:,.0f} of them",
                f"{time.stage_seconds / _HOUR:,.1f} h, {whole:,.0f} GPU-hours, ${whole * price:,.0f}",
            )
        )
    return [*rows, ("price of a GPU-hour", f"${price:g}")]
