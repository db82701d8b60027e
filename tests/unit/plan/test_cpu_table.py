"""The table of a plan on CPUs, as `megatron-r1 plan` prints it."""

from __future__ import annotations

import json

import pytest

from megatron_r1 import cli
from megatron_r1.plan import memory_cpu
from tests.paths import ROOT

ZERO = ["plan", "--config", str(ROOT / "examples/tiny_cpu/r1_zero.yaml"), "--stage", "grpo"]
PAGE = ROOT / "docs/how_to/plan.md"


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_cpu, "machine_bytes", lambda: 8 * 10**9)


def test_both_tables_and_that_it_fits(capsys, tmp_path) -> None:
    assert cli.main([*ZERO, "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert f"    megatron-r1 {' '.join(ZERO)}\n".replace(f"{ROOT}/", "") in PAGE.read_text(encoding="utf-8")
    assert "plan of grpo: 1 rank(s) on 1 node(s) of 1 CPU" in out
    assert "resident memory of the process of the rank that needs most, GB; the machine has 8.0" in out
    assert "of all processes of a machine" in out and "engine: 0.07 GB of cache" in out and "fits; times are planned" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["device"] == "cpu" and plan["time"] is None
    assert [phase["phase"] for phase in plan["memory"]] == ["sampling", "log-probs", "update", "saving", "weight sync"]


def test_what_does_not_fit_ends_with_code_2(capsys) -> None:
    assert cli.main([*ZERO, "rollout.kv_cache_bytes=9000000000"]) == 2
    told = capsys.readouterr()
    assert "\ndoes not fit: " in told.out and told.err.count("\n") == 1
    assert told.err.startswith("megatron-r1: error: grpo does not fit: ")
    assert told.err.endswith("of it engine cache 9.0 GB: change rollout.kv_cache_bytes\n")


def test_a_page_is_of_devices(capsys, tmp_path) -> None:
    assert cli.main([*ZERO, "--page", str(tmp_path / "plan.html")]) == 2
    assert "--page is of devices" in capsys.readouterr().err and not (tmp_path / "plan.html").exists()
