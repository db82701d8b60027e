"""The run folder: resume after a kill at any moment, verified checkpoints, one writer."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_r1.config.load import load_config
from megatron_r1.errors import CheckpointError, DataError
from megatron_r1.runtime.checkpoints import complete_checkpoints
from megatron_r1.runtime.metrics import read_metrics
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Unwritten
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from tests.patience import patient, slowness, wait_until

CONFIG = load_config(None, ["checkpoint.interval=2", "checkpoint.keep=2"])


def write_weights(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "weights.bin").write_bytes(bytes(range(256)))


def group(step: int) -> RolloutGroup:
    prompt = Prompt(id=f"p{step}", question="1+1?", answer="2", text="1+1?", token_ids=(1, 2))
    rollouts = [Rollout([3, 4], [-0.1, -0.2], "<think>\u4e8c</think>", True), Rollout([5], [-0.3], "x", False)]
    rewards = torch.tensor([2.0, 0.0], dtype=torch.float64)
    return RolloutGroup(prompt, rollouts, step - 1, rewards, {"accuracy": [1.0, 0.0]}, torch.tensor([1.0, -1.0]))


def train(folder: Path, steps: int, config=CONFIG) -> Run:
    with Run.open(folder, config, "grpo") as run:
        for step in run.steps(steps, "grpo"):
            with run.timer("rollout"):
                run.save_rollouts(step, [group(step)])
            run.record(step, {"loss": 1 / step})
            if run.checkpoint_due(step, steps):
                run.checkpoint(step, write_weights, {"cursor": step * 16})
    return run


def test_flops_become_a_speed_and_a_share_of_the_peak(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_r1.runtime.run.peak_of", lambda device, dtype: 1e12)
    with Run.open(tmp_path / "run", CONFIG, "grpo") as run:
        for step in run.steps(2, "grpo"):
            with run.timer("train"):
                time.sleep(0.01)
            if step == 1:
                run.count_tokens("train", 100)
                run.count_flops(1.5e9)
                run.count_flops(0.5e9)
            run.record(step, {})
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for part in ("train", "step"):
        assert first[f"flops_per_second/{part}"] == pytest.approx(2e9 / first[f"seconds/{part}"])
        assert first[f"mfu/{part}"] == pytest.approx(first[f"flops_per_second/{part}"] / 1e12)
    assert first["tokens_per_second/device"] == pytest.approx(100 / first["seconds/step"], rel=1e-2)
    assert not any(name.startswith(("flops_per_second/", "mfu/", "tokens_per_second/")) for name in second)


def test_a_run_records_each_step_and_keeps_the_newest_checkpoints(tmp_path):
    run = train(tmp_path / "run", 7)
    records = read_metrics(run.folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 8))
    assert records[3]["loss"] == 0.25
    assert 0 < records[0]["seconds/rollout"] <= records[0]["seconds/step"]
    assert "seconds/checkpoint" in records[2], "a checkpoint's time counts in the record after it"
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step_000006", "step_000007"]
    assert load_config(run.folder / "config.yaml") == CONFIG

    lines = [json.loads(line) for line in (run.folder / "rollouts" / "step_000003.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["response"] == "<think>\u4e8c</think>"
    assert (lines[1]["prompt_id"], lines[1]["reward"], lines[1]["advantage"], lines[1]["length"]) == ("p3", 0.0, -1.0, 1)
    assert lines[1]["reward_parts"] == {"accuracy": 0.0}
    assert lines[1]["weights_version"] == 2


def test_resume_drops_what_came_after_the_checkpoint_and_redoes_it(tmp_path):
    folder = tmp_path / "run"
    with Run.open(folder, CONFIG, "grpo") as run:
        assert run.step == 0
        assert run.resumed_from is None
        run.record(0, {"eval/pass@1": 0.25})
        for step in run.steps(9, "grpo"):
            run.save_rollouts(step, [group(step)])
            run.record(step, {"loss": float(step)})
            if step == 4:
                run.checkpoint(step, write_weights, {"cursor": 64})
            if step == 6:
                break
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a kill in the middle of a write

    with Run.open(folder, CONFIG, "grpo") as run:
        assert run.step == 4
        assert run.resumed_from == folder / "checkpoints" / "step_000004"
        assert run.state == {"cursor": 64}
        assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
        assert len(list((folder / "rollouts").iterdir())) == 4
        for step in run.steps(6, "grpo"):
            run.record(step, {"loss": -float(step)})
    assert [record.get("loss") for record in read_metrics(folder / "metrics.jsonl")] == [None, 1, 2, 3, 4, -5, -6]
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, -5), (6, -6)]


def test_a_run_without_checkpoint_starts_over(tmp_path):
    for _ in range(2):
        with Run.open(tmp_path / "run", CONFIG, "grpo") as run:
            run.record(0, {"eval/pass@1": 0.5})
            for step in run.steps(1, "grpo"):
                run.record(step, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_a_finished_run_has_no_steps_left(tmp_path):
    train(tmp_path / "run", 3)
    with Run.open(tmp_path / "run", CONFIG, "grpo") as run:
        assert list(run.steps(3, "grpo")) == []


def test_parts_of_a_run_count_to_its_end(tmp_path, capsys):
    ends, shown = [], set()
    with Run.open(tmp_path / "run", CONFIG, "grpo") as run:
        for total in (2, 3, 5):
            for step in run.steps(total, "grpo", end=4):
                sign = run._heartbeat._sign  # what `status` reads
                ends.append((sign.step, sign.total))
                shown.add(id(run._progress))
                run.record(step, {"loss": 1.0})
                if run.checkpoint_due(step, total):
                    run.checkpoint(step, write_weights, {})
            run.go_on()
            assert run.step == total
    assert ends == [(1, 4), (2, 4), (3, 4), (4, 5), (5, 5)], "rounds behind the end have an end of their own"
    assert len(shown) == 2, "one bar goes through all parts"
    told = [line.split(",")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("grpo: ")]
    assert told == ["grpo: 5/5"]


def test_a_number_that_is_not_finite_keeps_the_file_readable(tmp_path):
    with Run.open(tmp_path / "run", CONFIG, "grpo") as run:
        run.record(1, {"loss": float("nan"), "tokens": 3})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["loss"] is None
    assert record["tokens"] == 3


def test_a_malformed_metrics_line_is_named(tmp_path):
    train(tmp_path / "run", 3)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{nonsense", lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2"):
        Run.open(tmp_path / "run", CONFIG, "grpo")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("name", ["policy/weights.bin", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_it_used(tmp_path, capsys, name, damage):
    folder = train(tmp_path / "run", 4).folder
    before = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    damage(folder / "checkpoints" / "step_000004" / name)
    with Run.open(folder, CONFIG, "grpo") as run:
        assert (run.step, run.state) == (2, {"cursor": 32})
        assert run.resumed_from == folder / "checkpoints" / "step_000002"
    told = [line for line in capsys.readouterr().err.splitlines() if "corrupt" in line]
    assert len(told) == 1
    assert f"step_000004/{name}" in told[0] and "using step_000002" in told[0]
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert len(list((folder / "rollouts").iterdir())) == 2
    assert (folder / "checkpoints" / "corrupt-step_000004" / "COMPLETE").is_file()

    train(folder, 6)
    assert [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] == [*before, 1 / 5, 1 / 6]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["corrupt-step_000004", "step_000004", "step_000006"], (
        "what is corrupt is kept, and not among those that are kept"
    )


def test_with_every_checkpoint_corrupt_a_run_does_not_start_over_by_itself(tmp_path):
    folder = train(tmp_path / "run", 4).folder
    metrics = (folder / "metrics.jsonl").read_text()
    for name in ("step_000002", "step_000004"):
        flip_bit(folder / "checkpoints" / name / "policy" / "weights.bin")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match="only corrupt-step_000002, corrupt-step_000004: .* remove what is corrupt"
        ) as caught:
            Run.open(folder, CONFIG, "grpo")
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
        assert (folder / "metrics.jsonl").read_text() == metrics
    for path in (folder / "checkpoints").iterdir():
        shutil.rmtree(path)
    with Run.open(folder, CONFIG, "grpo") as run:
        assert (run.step, run.state) == (0, None)


def test_training_goes_on_beside_a_checkpoint_that_is_of_its_own_step(tmp_path):
    """Written while three more steps are taken, it holds what step 2 held; the next one waits for it."""
    folder, gate, content = tmp_path / "run", tmp_path / "gate", bytearray(b"step 2")

    def save(checkpoint: Path) -> Unwritten:
        def write() -> str:
            while not gate.exists():
                time.sleep(0.01)
            (checkpoint / "weights.bin").write_bytes(content)
            return "written"

        return Unwritten(["weights.bin"], write, lambda results: (checkpoint / "finished").write_text(results[0]))

    with Run.open(folder, CONFIG, "grpo") as run:
        for step in run.steps(6, "grpo"):
            run.record(step, {"loss": float(step)})
            if step == 2:
                run.checkpoint(step, save, {"cursor": step})
                content[:] = b"step 3"
            if step == 5:
                assert run.step == 0 and complete_checkpoints(folder / "checkpoints") == []
                gate.touch()
                run.checkpoint(step, save, {"cursor": step})
                assert run.step == 2, "one that comes due waits for the one before it"
    first, second = complete_checkpoints(folder / "checkpoints")
    assert (first.name, second.name) == ("step_000002", "step_000005"), "the end of the run waits too"
    assert (first / "weights.bin").read_bytes() == b"step 2"
    assert json.loads((first / "state.json").read_text()) == {"cursor": 2}
    assert (first / "finished").read_text() == "written"
    assert set(json.loads((first / "manifest.json").read_text())["files"]) == {"finished", "state.json", "weights.bin"}
    assert (second / "weights.bin").read_bytes() == b"step 3"


def fail_to_write() -> None:
    raise OSError(28, "No space left on device")


def fail_behind_another_error() -> None:
    """As torch's serializer does it."""
    try:
        fail_to_write()
    except OSError:
        raise RuntimeError("unexpected pos 576 vs 470")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("asynchronous", "write", "reason"),
    [
        (False, fail_to_write, "No space left on device"),
        (False, fail_behind_another_error, "No space left on device"),
        (True, fail_to_write, "No space left on device"),
        (True, fail_behind_another_error, "No space left on device"),
        (True, die, r"the process that was writing died \(SIGKILL\), perhaps for want of memory"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, asynchronous, write, reason):
    config = load_config(None, ["checkpoint.keep=1", f"checkpoint.asynchronous={asynchronous}"])
    message = f"step_000002 cannot be written: {reason}; the run can resume from the one before"
    with pytest.raises(CheckpointError, match=message) as caught, Run.open(tmp_path, config, "grpo") as run:
        for step in run.steps(1000, "grpo"):
            run.record(step, {"loss": 1.0})
            if step <= 2:
                run.checkpoint(step, lambda _: Unwritten((), write if step == 2 else int, lambda _: None), {})  # noqa: B023
            time.sleep(0.01)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert run.step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"], "nothing else takes up room"
    with Run.open(tmp_path, config, "grpo") as run:
        assert run.step == 1


def test_after_an_error_in_training_ctrl_c_ends_the_writer(tmp_path):
    def save(checkpoint: Path) -> Unwritten:
        def write() -> None:
            (checkpoint / "writer").write_text(str(os.getpid()))
            time.sleep(3600)

        return Unwritten((), write, lambda _: None)

    with pytest.raises(KeyError), Run.open(tmp_path, CONFIG, "grpo") as run:
        for step in run.steps(2, "grpo"):
            run.checkpoint(step, save, {})
            pid = wait_for_pid(tmp_path / "checkpoints" / ".tmp-step_000001" / "writer")
            for seconds in (0.1, 1.3):  # the first is too early: it may be that which a launcher passes on
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise KeyError
    assert ends(pid)
    assert complete_checkpoints(tmp_path / "checkpoints") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def ends(pid: int) -> bool:
    """Whether the process is gone, or a zombie that nobody waits for, at once or a little later."""
    wait_until(lambda: not Path(f"/proc/{pid}/fd/1").exists(), 10, f"end of process {pid}")
    return True


def wait_for_pid(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text(), 60, f"number in {path.name}")
    return int(path.read_text())


WORKER = """
    import os, random, sys, time
    from pathlib import Path
    from megatron_r1.config.load import load_config
    from megatron_r1.runtime.run import Run
    from megatron_r1.runtime.saving import Unwritten

    def write(folder):
        def write_files():
            (folder / "writer").write_text(str(os.getpid()))
            for index in range(20):
                (folder / f"{index}.bin").write_bytes(bytes(2000))
                time.sleep(0.001)

        return Unwritten([f"{index}.bin" for index in range(20)], write_files, lambda _: None)

    config = load_config(None, ["checkpoint.interval=3", "checkpoint.keep=2"])
    with Run.open(Path(sys.argv[1]), config, "grpo") as run:
        generator, total = random.Random(0), 0.0
        if run.state:
            generator.setstate((run.state["rng"][0], tuple(run.state["rng"][1]), None))
            total = run.state["total"]
        for step in run.steps(int(sys.argv[2]), "grpo"):
            total += generator.random()
            run.record(step, {"total": total})
            if run.checkpoint_due(step, int(sys.argv[2])):
                run.checkpoint(step, write, {"rng": generator.getstate(), "total": total})
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_no_metric(tmp_path):
    """Killed again and again at random moments, while checkpoints are written too, a run ends with the metrics of a quiet one."""
    script, folder, steps = tmp_path / "worker.py", tmp_path / "killed", int(60 * slowness())
    script.write_text(textwrap.dedent(WORKER))

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, str(script), str(folder), str(steps)], stderr=subprocess.PIPE, text=True)

    moments = random.Random(1)
    killed = 0
    for _ in range(3):
        process = start()
        third = _last_step(folder) + 3
        wait_until(lambda: process.poll() is not None or _last_step(folder) >= third, 60, "third step", pause=0.005)  # noqa: B023
        time.sleep(moments.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        for path in (folder / "checkpoints").glob(".tmp-*/writer"):
            with suppress(FileNotFoundError):  # all was written, and it is sealed now
                assert not path.read_text() or ends(int(path.read_text())), "a writer outlived its run"
    assert killed >= 2
    last = start()
    assert last.wait(timeout=patient(120)) == 0, last.stderr.read()
    assert "resuming" in last.stderr.read()

    generator, total, expected = random.Random(0), 0.0, []
    for step in range(1, steps + 1):
        total += generator.random()
        expected.append((step, total))
    assert [(record["step"], record["total"]) for record in read_metrics(folder / "metrics.jsonl")] == expected


def _last_step(folder: Path) -> int:
    records = read_metrics(folder / "metrics.jsonl")
    return records[-1]["step"] if records else 0
