"""Bars of a plan as SVG, without scripts: memory stacked by what takes it, and a time line of phases that wait for each other."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_r1.plan.terms import Term, TimePhase

_WIDTH, _LABELS, _TOP = 1000, 220, 22  # pixels of a chart, of the names left of the bars, and above the bars
_MARGIN = 40  # right of the bars, where half of the last number of the axis stands
_GAP = 6  # between groups of bars
_TICKS = 6  # at most, on an axis


@dataclass(frozen=True)
class Bar:
    """One stacked bar."""

    label: str  #: left of it; "": it stands under the one before
    name: str  #: of what it is, for its tips
    terms: tuple[Term, ...]

    @property
    def total(self) -> float:
        """Of its terms."""
        return sum(term.amount for term in self.terms)


class Palette:
    """A colour for every name, the same in all charts of a page. Neighbours differ; tips and tables say the names once more."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))

    def of(self, name: str) -> str:
        """As CSS writes it."""
        number = self.names.index(name)
        return f"hsl({(210 + number * 137.508) % 360:.0f},{(55, 40, 65)[number % 3]}%,{(48, 62, 38)[number // 2 % 3]}%)"


def draw_bars(bars: Sequence[Bar], palette: Palette, room: float, unit: float, unit_name: str) -> str:
    """Stacked bars with a line at the room that there is.

    Args:
        room: in the unit of the terms.
        unit: of the axis, in that of the terms, such as 1e9 bytes.
    """
    far = max([room, *(bar.total for bar in bars)])
    height = 9 if len(bars) > 12 else 18
    parts, y = [], _TOP
    for bar in bars:
        y += _GAP if bar.label else 1
        if bar.label:
            parts.append(_svg_text(_LABELS - 8, y + height / 2 + 4, bar.label, "end"))
        at = 0.0
        for term in bar.terms:
            x, width = _across(at, far), _across(at + term.amount, far) - _across(at, far)
            tip = f"{bar.name}: {term.name} {term.amount / unit:,.2f} {unit_name}" + (f", {term.setting}" if term.setting else "")
            parts.append(_svg_rect(x, y, width, height, palette.of(term.name), tip))
            at += term.amount
        y += height
    line = _across(room, far)
    parts.append(
        f'<line class="room" x1="{line:.1f}" x2="{line:.1f}" y1="{_TOP}" y2="{y + 4}" stroke="#b00020" stroke-dasharray="4 3"/>'
    )
    parts.append(_svg_text(line, _TOP - 8, f"{room / unit:,.1f} {unit_name}", "end" if line > _WIDTH - 80 else "middle"))
    return _svg("".join(parts) + _axis(far, unit, y), y + 24)


def draw_time_line(phases: Sequence[TimePhase], palette: Palette) -> str:
    """A row a phase, from when those that it waits for have ended."""
    starts = start_times(phases)
    far = max(starts[phase.name] + phase.seconds for phase in phases) or 1.0
    parts, y = [], _TOP
    for phase in phases:
        parts.append(_svg_text(_LABELS - 8, y + 14, phase.name, "end"))
        at = starts[phase.name]
        for term in phase.terms:
            x, width = _across(at, far), _across(at + term.amount, far) - _across(at, far)
            tip = f"{phase.name}: {term.name} {term.amount:,.2f} s" + (f", {term.setting}" if term.setting else "")
            parts.append(_svg_rect(x, y, width, 20, palette.of(term.name), tip))
            at += term.amount
        y += 20 + _GAP
    return _svg("".join(parts) + _axis(far, 1.0, y), y + 24)


def start_times(phases: Sequence[TimePhase]) -> dict[str, float]:
    """Phase -> seconds from the start of the first."""
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    for phase in phases:
        starts[phase.name] = max((ends[name] for name in phase.waits_for), default=0.0)
        ends[phase.name] = starts[phase.name] + phase.seconds
    return starts


def _across(amount: float, far: float) -> float:
    return _LABELS + (_WIDTH - _LABELS - _MARGIN) * amount / far


def _axis(far: float, unit: float, y: float) -> str:
    step = _round_step(far / unit / _TICKS)
    ticks = (step * number for number in range(int(far / unit / step * (1 + 1e-9)) + 1))
    return "".join(_svg_text(_across(tick * unit, far), y + 16, f"{tick:,g}", "middle") for tick in ticks)


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, and not below `least`."""
    power = 10.0 ** len(str(int(least))) / 10 if least >= 1 else 1.0
    while power > least:
        power /= 10
    return next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= least * (1 - 1e-9))


def _svg_rect(x: float, y: float, width: float, height: float, colour: str, tip: str) -> str:
    shape = f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{colour}">'
    return f"{shape}<title>{html.escape(tip)}</title></rect>"


def _svg_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(content: str, height: float) -> str:
    return (
        f'<svg class="plan" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" role="img">{content}</svg>'
    )
