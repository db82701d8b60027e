"""Bars and time lines of a plan: lengths in proportion, tips, and names that stay text."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from megatron_r1.plan.terms import Term, TimePhase
from megatron_r1.report.plan_charts import Bar, Palette, draw_bars, draw_time_line, start_times

HOSTILE = "<script>hit()</script>&\"'"


def parse(svg: str) -> tuple[list[dict[str, float]], list[str], list[str]]:
    """Rectangles, their tips, and texts of a chart."""
    root = ElementTree.fromstring(svg)
    found = [{name: float(rect.get(name, "nan")) for name in ("x", "y", "width", "height")} for rect in root.iter("rect")]
    return found, [title.text or "" for title in root.iter("title")], [text.text or "" for text in root.iter("text")]


def test_bars_are_as_long_as_their_terms_and_follow_each_other() -> None:
    bars = [
        Bar("update", "update, stage 0", (Term("weights", 20e9, "parallel.tp"), Term("logits", 10e9))),
        Bar("", "update, stage 1", (Term("weights", 40e9),)),
    ]
    rects, tips, texts = parse(draw_bars(bars, Palette(["weights", "logits"]), 80e9, 1e9, "GB"))
    first, second, third = rects
    assert first["width"] == pytest.approx(2 * second["width"], abs=0.02) == pytest.approx(third["width"] / 2, abs=0.02)
    assert second["x"] == pytest.approx(first["x"] + first["width"], abs=0.02) and first["x"] == third["x"] > 200
    assert first["y"] == second["y"] < third["y"] and rects[0]["height"] + first["y"] <= third["y"]
    assert tips == [
        "update, stage 0: weights 20.00 GB, parallel.tp",
        "update, stage 0: logits 10.00 GB",
        "update, stage 1: weights 40.00 GB",
    ]
    assert texts[0] == "update" and "80.0 GB" in texts
    assert [text for text in texts if re.fullmatch(r"[\d.,]+", text)] == ["0", "20", "40", "60", "80"]


def test_what_is_more_than_the_room_goes_beyond_its_line() -> None:
    svg = draw_bars([Bar("update", "update", (Term("weights", 200.0),))], Palette(["weights"]), 100.0, 1.0, "GB")
    (rect,), _, _ = parse(svg)
    line = float(re.search(r'<line class="room" x1="([\d.]+)"', svg)[1])
    assert rect["x"] < line < rect["x"] + rect["width"] <= 1000
    assert line - rect["x"] == pytest.approx(rect["width"] / 2, abs=0.1)


def test_a_phase_begins_when_those_that_it_waits_for_have_ended() -> None:
    phases = [
        TimePhase("sampling", (Term("decode", 30.0), Term("tail", 10.0))),
        TimePhase("update", (Term("products", 20.0),), ("sampling",)),
        TimePhase("sync", (Term("wire", 5.0),), ("update",)),
        TimePhase("save", (Term("to the host", 1.0),), ("update",)),
        TimePhase("between", (), ("sync", "save")),
    ]
    assert start_times(phases) == {"sampling": 0, "update": 40, "sync": 60, "save": 60, "between": 65}
    rects, tips, texts = parse(draw_time_line(phases, Palette(["decode", "tail", "products", "wire", "to the host"])))
    decode, tail, products, wire, save = rects
    assert tail["x"] + tail["width"] == pytest.approx(products["x"], abs=0.02)
    assert wire["x"] == save["x"] == pytest.approx(products["x"] + products["width"], abs=0.02) and wire["y"] < save["y"]
    assert decode["width"] / products["width"] == pytest.approx(1.5, rel=0.01)
    assert tips[0] == "sampling: decode 30.00 s" and "between" in texts


def test_names_stay_text() -> None:
    bars = [Bar(HOSTILE, HOSTILE, (Term(HOSTILE, 1.0, HOSTILE),))]
    for svg in (
        draw_bars(bars, Palette([HOSTILE]), 2.0, 1.0, HOSTILE),
        draw_time_line([TimePhase(HOSTILE, bars[0].terms)], Palette([HOSTILE])),
    ):
        _, tips, texts = parse(svg)
        assert HOSTILE in tips[0] and HOSTILE in texts and "<script" not in svg


def test_every_name_has_one_colour() -> None:
    palette = Palette([*(f"term {n}" for n in range(20)), "term 3"])
    assert len({palette.of(name) for name in palette.names}) == 20 and palette.of("term 3") == Palette(palette.names).of("term 3")


@pytest.mark.parametrize("far", (0.003, 0.9, 7, 80, 1234, 2e6))
def test_an_axis_has_a_few_round_numbers(far: float) -> None:
    _, _, texts = parse(draw_bars([Bar("", "", (Term("a", far),))], Palette(["a"]), far, 1.0, "GB"))
    ticks = [float(text.replace(",", "")) for text in texts if re.fullmatch(r"[\d.,e+-]+", text)]
    steps = [b - a for a, b in pairwise(ticks)]
    assert 3 <= len(ticks) <= 8 and ticks[0] == 0 and ticks[-1] <= far * 1.0001
    assert max(steps) == pytest.approx(min(steps))
