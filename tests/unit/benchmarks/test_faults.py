"""What the benchmarks of kills and faults compare: content, and nothing that a clock measured."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.kills import differences, hashes
from benchmarks.pretrain_kills import Live, Made, Moment, choose_moments, compare
from megatron_r1.runtime import files, inputs
from megatron_r1.runtime.inputs import NOTES
from tests.slurm.jobs import read_metrics


def test_inputs_are_compared_by_content_and_not_by_when_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FRESH_NANOSECONDS", 0)
    found = {}
    for name, content, age in (("early", "1", 1000.0), ("late", "1", 0.0), ("other", "2", 1000.0)):
        folder = tmp_path / name
        (folder / "run").mkdir(parents=True)
        monkeypatch.chdir(folder)
        Path("data.txt").write_text(content)
        os.utime("data.txt", (time.time() - age,) * 2)
        inputs.compare_inputs(folder / "run", {"data.source": "data.txt"}, None)
        found[name] = hashes(folder / "run")[NOTES]
    assert Path(tmp_path, "early/run", NOTES).read_bytes() != Path(tmp_path, "late/run", NOTES).read_bytes()
    assert found["early"] == found["late"] != found["other"]


def test_metrics_of_two_runs_differ_in_numbers_and_not_in_times(tmp_path: Path) -> None:
    for name, loss, idle in (("a", 0.5, 0.1), ("b", 0.5, 0.2), ("c", 0.25, 0.1)):
        (tmp_path / name).mkdir()
        line = f'{{"step": 1, "loss": {loss}, "rollout/idle": {idle}, "seconds/train": {idle}}}\n'
        (tmp_path / name / "metrics.jsonl").write_text(line)
    a, b, c = (read_metrics(tmp_path / name) for name in "abc")
    assert list(differences(a, b, 0.0)) == []
    assert list(differences(a, c, 0.0)) == ["step 1 loss: 0.25 instead of 0.5"]


def test_kills_of_a_pretraining_come_in_order_and_one_of_each_kind() -> None:
    for seed in range(20):
        moments = choose_moments(10, [7, 19, 31], random.Random(seed))
        steps = [moment.step for moment in moments]
        assert steps == sorted(steps) and len(steps) == 10 and 0 < min(steps) and max(steps) == 31
        kinds = [moment.kind for moment in moments]
        assert {kinds.count(kind) for kind in ("phase", "save", "export", "start")} == {1} and kinds[-1] == "export"
        assert next(moment.step for moment in moments if moment.kind == "phase") in (7, 19)
    assert [moment.kind for moment in choose_moments(1, [7, 19], random.Random(0))] == ["phase"]


def test_a_moment_has_come_when_this_start_has_got_there(tmp_path: Path) -> None:
    run, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    saved, saving = run / "checkpoints/step_000003", run / "checkpoints/.tmp-step_000006"
    saved.mkdir(parents=True)
    (saved / "COMPLETE").touch()

    def lines(count: int, into: Path = metrics) -> None:
        into.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, count + 1)))

    lines(7)
    live = Live(tmp_path)
    kinds = [Moment("step", 5, 0.5), Moment("save", 5, 0.5), Moment("phase", 6, 0.1), Moment("phase", 6, 0.9)]
    assert live.last_step() == -1 and not any(map(live.has_come, kinds)), "those lines are of the start before"
    lines(3, run / "new")
    (run / "new").replace(metrics)
    assert live.last_step() == 3 and live.was_hit(Moment("start", 9, 0.5)) and not any(map(live.has_come, kinds))
    lines(6)
    saving.mkdir()
    assert list(map(live.has_come, kinds)) == [True, True, True, False] and not live.was_hit(Moment("start", 9, 0.5))
    assert live.was_hit(Moment("save", 5, 0.5)) and live.was_hit(Moment("phase", 6, 0.9))
    saving.rename(run / "checkpoints/step_000006")
    (run / "checkpoints/step_000006/COMPLETE").touch()
    assert live.has_come(kinds[-1]) and not live.was_hit(Moment("save", 5, 0.5))
    lines(7)
    assert not live.was_hit(Moment("phase", 6, 0.9))


def test_what_differs_after_kills_is_told() -> None:
    def made(loss: float = 1.0) -> Made:
        metrics = [{"step": step, "loss": loss if step > 2 else 1.0, "lr": 0.1} for step in range(1, 5)]
        samples = {str(step): "sample" for step in range(1, 5)}
        return Made({"hf/config.json": "x"}, {"hf/config.json"}, {2: {"a": 1}, 4: {"a": loss}}, metrics, samples)

    whole, changed = made(1.0), made(1.00001)
    assert compare(changed, whole, changed, 2) == []
    spoilt = {
        "hf/config.json differs": replace(changed, files={"hf/config.json": "y"}),
        "left.json is in one run alone": replace(changed, names={"hf/config.json", "left.json"}),
        "step 4 loss: 1.0 instead of 1.00001": replace(changed, metrics=[*changed.metrics[:3], {**whole.metrics[3]}]),
        "up to the change of layout, step 1 lr: 0.2": replace(
            changed, metrics=[{**changed.metrics[0], "lr": 0.2}, *changed.metrics[1:]]
        ),
        "checkpoint 2: a": replace(changed, checkpoints=changed.checkpoints | {2: {"a": 2}}),
        "checkpoint 4: a": replace(changed, checkpoints=changed.checkpoints | {4: {"a": 1.0}}),
        "step 3 has other samples than the run undisturbed": replace(changed, samples=changed.samples | {"3": "other"}),
    }
    for told, found in spoilt.items():
        assert any(problem.startswith(told) for problem in compare(found, whole, changed, 2)), told
    assert "in another layout, step 3 loss: 2.0 instead of 1.0" in compare(made(2.0), whole, made(2.0), 2)
