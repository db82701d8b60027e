"""The table of attacks: none is accepted, nothing of one is left when it has ended, and none is seen by the program after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_r1.rewards.sandbox.probe import probe_sandbox
from megatron_r1.rewards.sandbox.supervisor import SandboxSettings
from tests.attack_table import SECRET, Attack, combined, read_table, run_attacks

PROBE = probe_sandbox(SandboxSettings())
pytestmark = [pytest.mark.alone, pytest.mark.skipif(not PROBE.available, reason=PROBE.reason)]


def children_of_tests() -> list[str]:
    """The processes of sandboxes that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent in (1, os.getpid()) and (b"/runner/main.py" in command or b"sandbox" in command.split(b"\0")[0]):
            found.append(command.decode(errors="replace")[:200])
    return found


def test_no_attack_of_the_table_succeeds():
    attacks, before = read_table()[1], children_of_tests()
    assert len(attacks) > 380 and len(set(attacks)) == len(attacks)
    ran = run_attacks(attacks)
    assert [(finding.attack, finding.what) for finding in ran.findings] == []
    assert len(ran.verdicts) == len(attacks) and "accepted" not in ran.verdicts
    assert {"wrong", "runtime_error", "time_limit", "memory_limit", "output_limit"} == set(ran.verdicts)
    assert children_of_tests() == before


def test_programs_of_several_attacks_do_not_succeed():
    assert run_attacks([attack for attack in combined(20, seed=3) if not attack.sleeps]).findings == []


def test_the_table_would_tell():
    def findings(body):
        return [finding.what for finding in run_attacks([Attack("x", body, False)]).findings]

    assert findings(f"return '{SECRET}'") == ["verdict accepted: "]
    assert findings("breach('x')")[0].startswith("BREACH ('x',)") and findings("return 1") == []
