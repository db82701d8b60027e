"""A plan's page: what is on it, and that it opens without a network."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.cli import main
from megatron_r1.plan.stage_time import TimePlan
from megatron_r1.plan.terms import MemoryPhase, Term, TimePhase
from megatron_r1.report.plan_page import PlanPage, plan_body, write_plan_page
from tests.headless_browser import Browser, find_browser
from tests.paths import ROOT

BROWSER = find_browser()
HOSTILE = "</pre><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"


def phases(stage: int) -> list[MemoryPhase]:
    """Of a pipeline stage: the later, the more weights."""
    weights = Term("weights", (20 + stage) * 1e9, "parallel.tp")
    host = (Term("reference", (100 - stage) * 1e9, "runtime.offload"),)
    return [
        MemoryPhase("sampling", (weights, Term("engine cache", 30e9)), host),
        MemoryPhase("update", (weights, Term("activations", 45e9, "runtime.recompute")), host),
    ]


TIME = TimePlan(
    "round",
    (TimePhase("sampling", (Term("decode", 90.0),)), TimePhase("update", (Term("products", 10.0),), ("sampling",))),
    devices=16, tokens=3.2e6, flops=1e18, peak=1e15, units=36, stage_seconds=3600, assumptions=("responses of 9 tokens",),
)  # fmt: skip
PAGE = PlanPage("plan of grpo", "plan of grpo: 16 ranks", [phases(stage) for stage in range(4)], 80e9, 1e12, time=TIME)


def test_memory_time_and_cost_are_on_the_page() -> None:
    body = plan_body(PAGE)
    titles = [html.unescape(title) for title in re.findall("<title>(.*?)</title>", body)]
    assert "update, pipeline stage 3: activations 45.00 GB, runtime.recompute" in titles
    assert len(titles) == 4 * 2 * 2 + 2 + 2  # device, node, time
    assert "<td>in all</td><td>53.00</td><td>68.00</td>" in body  # of the fullest stage
    assert "<td>in all</td><td>100.00</td><td>100.00</td>" in body
    assert "100.0 s in all" in body and "<td>update</td><td>90.00</td><td>10.00</td>" in body
    assert "0.44 GPU-hours, $0.89" in body and "1.0 h, 16 GPU-hours, $32" in body and "responses of 9 tokens" in body
    assert "2,000.0" in body and "62.5%" in body
    assert "Does not fit" not in body


def test_the_command_writes_every_pipeline_stage(tmp_path: Path, capsys) -> None:
    page = tmp_path / "plan.html"
    arguments = ["plan", "--config", str(ROOT / "examples/v3_671b/r1_zero.yaml"), "--gpu", "H800", "--nodes", "64", "--page"]
    assert main([*arguments, str(page), "grpo.prompts_per_rollout=32"]) == 0
    text = page.read_text(encoding="utf-8")
    assert {f"pipeline stage {stage}: weights" in text for stage in range(16)} == {True} and "pipeline stage 16" not in text
    assert "<h2>Time of a round</h2>" in text and "650 of them" in text
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "no" / "plan.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_what_there_is_not_has_no_chart() -> None:
    body = plan_body(replace(PAGE, time=None, stages=[[MemoryPhase("converting", (), PAGE.stages[0][0].host)]]))
    assert "Memory of a device" not in body and "Time of" not in body and "Memory of a node" in body
    assert "pipeline stage" not in body


@pytest.mark.slow
def test_the_page_opens_offline_and_text_stays_text(tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "plan.html"
    hostile = MemoryPhase(HOSTILE, (Term(HOSTILE, 90e9, HOSTILE),))
    write_plan_page(path, replace(PAGE, title=HOSTILE, head=HOSTILE, stages=[[hostile]], problems=[HOSTILE]))
    browser.problems.clear()
    browser.open(path)
    assert browser.run("document.querySelectorAll('svg.plan').length") == 2 and browser.run("window.hit === undefined")
    assert browser.run("document.querySelector('h1').textContent") == f"megatron_r1: {HOSTILE}"
    assert browser.run("document.querySelector('.problem').textContent") == f"Does not fit: {HOSTILE}"
    assert browser.run("document.querySelector('svg.plan title').textContent").startswith(HOSTILE)
    write_plan_page(path, PAGE)
    browser.open(path)
    assert browser.run("document.querySelectorAll('svg.plan rect').length") == 20 and not browser.problems
    outside = "b => { const box = b.getBBox(); return box.x < 0 || box.y < 0 || box.x + box.width > 1000; }"
    assert browser.run(f"[...document.querySelectorAll('svg.plan')].filter({outside}).length") == 0
    swatch = "getComputedStyle(document.querySelector('ul.plan span')).backgroundColor"
    assert browser.run(swatch) == browser.run("getComputedStyle(document.querySelector('svg.plan rect')).fill")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no chromium-headless-shell or other Chromium is installed (tools/install_system_packages.sh test)")
    with Browser(BROWSER) as opened:
        yield opened
