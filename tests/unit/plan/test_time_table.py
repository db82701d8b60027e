from __future__ import annotations

from megatron_r1.plan.stage_time import TimePlan
from megatron_r1.plan.terms import Term, TimePhase
from megatron_r1.plan.time_table import describe_time, time_record

PHASES = (
    TimePhase("update", (Term("experts", 1800.0), Term("bubble", 1700.0, "parallel.vpp"))),
    TimePhase("save", (Term("to the host", 100.0, "checkpoint.interval"),), ("update",)),
)
PLAN = TimePlan("update", PHASES, devices=8, tokens=28800.0, flops=3600 * 8e12, peak=2e12, units=10.0, stage_seconds=36000.0,
                assumptions=("rows of 4,096 tokens",))  # fmt: skip


def test_phases_parts_rates_and_cost() -> None:
    lines = describe_time(PLAN, 2.0).splitlines()
    assert lines[1] == "time of an update, seconds"
    assert lines[2] == "update             3,500.00  experts 1,800.00, bubble 1,700.00"
    assert lines[3] == "save                 100.00  to the host 100.00; after update"
    assert lines[4] == "the whole update   3,600.00"
    assert lines[5] == "longest: update; of it bubble 1,700.00 s, which parallel.vpp changes"
    assert lines[6] == "1.0 tokens/s a device, MFU 50.0%"
    assert lines[7] == "8.00 GPU-hours an update; 10 of them: 10.0 h, 80 GPU-hours, $160 at $2 a GPU-hour"
    assert lines[8] == "with rows of 4,096 tokens"


def test_programs_get_seconds() -> None:
    record = time_record(PLAN)
    assert record["seconds"] == 3600 and record["devices"] == 8
    phases = record["phases"]
    assert isinstance(phases, list) and phases[1]["waits_for"] == ["update"]
    assert phases[0]["parts"][1] == {"name": "bubble", "seconds": 1700.0, "setting": "parallel.vpp"}
