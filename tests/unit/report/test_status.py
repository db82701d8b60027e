"""Status by a clock that is not the run's: no negative ages, and what is not known is said."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict

import pytest

from megatron_r1.report.status import describe_status
from megatron_r1.runtime.heartbeat import ENDED, FOLDER, Sign, sign_path

NOW = 1_800_000_000.0


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "grpo", "started": "2026-01-01T00:00:00+00:00"}))
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds/step": 2.0}\n')
    (tmp_path / FOLDER).mkdir()
    return tmp_path


def give_sign(run, rank, node, at, activity="step", total=4):
    sign = Sign(rank, 2, node, node, 1, 1, at, 5.0, activity, at, 1, total)
    sign_path(run / FOLDER, rank).write_text(json.dumps(asdict(sign)))


def save(run, at):
    folder = run / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    (folder / "COMPLETE").touch()
    os.utime(folder / "COMPLETE", (at, at))


@pytest.mark.parametrize(
    ("ahead", "age"),
    [
        (-90, "1 min 30 s ago"),
        (0, "0 s ago"),
        (3, "0 s ago"),
        (7200, "by a clock that is 2 h 0 min ahead of this one"),
        (90, "by a clock that is 1 min 30 s ahead of this one"),
    ],
)
def test_the_age_of_a_checkpoint_is_never_negative(run, ahead, age):
    save(run, NOW + ahead)
    text = describe_status(run, NOW)
    assert f"checkpoint  step 1, {age}, in" in text
    assert not re.search(r"-\d+ (s|h|min)", text)


@pytest.mark.parametrize("ahead", [-5, 0, 3, 9])
def test_clocks_that_are_a_little_apart_are_not_spoken_of(run, ahead):
    for rank in (0, 1):
        give_sign(run, rank, f"n{rank}", NOW + ahead)
    text = describe_status(run, NOW)
    assert "grpo, running, begun" in text and "  clock " not in text


def test_a_node_whose_clock_is_ahead_is_named(run):
    give_sign(run, 0, "n0", NOW - 1)
    give_sign(run, 1, "n1", NOW + 3600)
    text = describe_status(run, NOW)
    assert "  clock       n1: up to 1 h 0 min ahead of this one; whether they still give signs is not known" in text
    give_sign(run, 1, "n1", NOW + 3600, activity=ENDED)
    assert "  clock " not in describe_status(run, NOW), "an end needs no age"


def test_steps_beyond_the_total_and_an_end_beyond_the_calendar(run):
    give_sign(run, 0, "n0", NOW, total=10**15)
    give_sign(run, 1, "n1", NOW, total=10**15)
    assert "at a time that no calendar has if it runs now" in describe_status(run, NOW)
    for rank in (0, 1):
        give_sign(run, rank, f"n{rank}", NOW, total=1)
    assert "ends" not in describe_status(run, NOW)


def test_steps_that_were_left_out_are_named_with_how_to_look_at_them(run):
    counts = [None, 0, 1, 1, 3]
    lines = [{"step": step} | ({} if count is None else {"updates/skipped": count}) for step, count in enumerate(counts, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "  left out    3 updates, in steps 3, 5\n" in describe_status(run, NOW)
    (run / "run.json").write_text(json.dumps({"command": "pretrain", "started": "2026-01-01T00:00:00+00:00"}))
    assert f"in steps 3, 5; megatron-r1 show-samples {run} 5\n" in describe_status(run, NOW)
    lines = [{"step": step, "updates/skipped": step} for step in range(1, 13)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "  left out    12 updates, in steps ..., 5, 6, 7, 8, 9, 10, 11, 12; " in describe_status(run, NOW)
    (run / "metrics.jsonl").write_text('{"step": 1, "updates/skipped": 0}\n')
    assert "left out" not in describe_status(run, NOW)


def test_speed_and_experts_of_the_last_step(run):
    record = {
        "step": 1, "seconds/step": 2.0, "tokens_per_second/device": 1500.0, "flops_per_second/step": 3.5e14,
        "flops_per_second/train": 4e14, "moe/load/layer_3": 1.5, "moe/load/layer_12": 2.25, "moe/bias_spread": 0.004,
    }  # fmt: skip
    for more, says in (({}, "train"), ({"mfu/step": 0.354, "mfu/train": 0.404}, "train; 35.4% and 40.4% of the peak (MFU)")):
        (run / "metrics.jsonl").write_text(json.dumps(record | more) + "\n")
        lines = describe_status(run, NOW).splitlines()
        assert "  rates       2 s a step, 1,500 device tokens/s" in lines
        assert f"  devices     350 TFLOPS each, 400 while they {says}" in lines
        assert "  experts     load up to 2.25 of the mean (layer 12), biases 0.004 apart" in lines
