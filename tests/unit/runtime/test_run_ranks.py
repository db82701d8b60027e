"""One run folder and two ranks: both write into a checkpoint, step back together where it is damaged, and fail together."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from megatron_r1.runtime.launch import child_environment
from megatron_r1.runtime.metrics import read_metrics
from tests.patience import patient

pytestmark = pytest.mark.slow
WORKER = """
    import sys, time
    from pathlib import Path
    from megatron_r1.config.load import load_config
    from megatron_r1.errors import NonFiniteUpdate, R1Error
    from megatron_r1.runtime import distributed
    from megatron_r1.runtime.device import resolve_device
    from megatron_r1.runtime.launch import read_launch
    from megatron_r1.runtime.run import Run
    from megatron_r1.runtime.saving import Unwritten

    folder = Path(sys.argv[1])
    distributed.join_process_group(read_launch(), resolve_device("cpu"), timeout_seconds=60)
    rank = distributed.rank()

    config = load_config(None, [])

    def save(path):
        (path / f"early_{rank}.bin").write_bytes(bytes([rank]) * 50)
        return Unwritten(
            [f"late_{rank}.bin"],
            lambda: (path / f"late_{rank}.bin").write_bytes(bytes([rank]) * 100),
            lambda sizes: (path / "sizes.txt").write_text(str(sizes)),
        )

    def fail(path):
        def write():
            if rank == 1:
                raise OSError(28, "No space left on device")
        return Unwritten([], write, lambda _: None)

    def message(work):
        try:
            work()
        except R1Error as error:
            return str(error)

    def train(run, steps, write):
        for step in run.steps(steps, "grpo"):
            run.record(step, {"loss": float(step + rank)})
            run.checkpoint(step, write, {"step": step, "rank": rank})

    with Run.open(folder, config, "grpo") as run:
        train(run, 3, save)
        busy = distributed.gather_objects(message(lambda: Run.open(folder, config, "grpo")))
    if rank == 0:
        (folder / "checkpoints" / "step_000003" / "late_1.bin").write_bytes(bytes(100))
    distributed.barrier()
    with Run.open(folder, config, "grpo") as run:
        resumed = distributed.gather_objects((run.step, run.state))
        full = distributed.gather_objects(message(lambda: train(run, 5, fail)))
    def save_slowly(path):
        def write():
            time.sleep(0.3 + 0.3 * rank)
            (path / f"{rank}.bin").write_bytes(bytes(10))
        return Unwritten([f"{rank}.bin"], write, lambda _: None)

    def train_into_an_error(run):
        for step in run.steps(3, "grpo"):
            run.checkpoint(step, save_slowly, {})
            raise NonFiniteUpdate("no more")

    failing = folder.with_name("failing")
    try:
        with Run.open(failing, config, "grpo") as run:
            train_into_an_error(run)
    except NonFiniteUpdate:
        pass
    distributed.barrier()
    with Run.open(failing, config, "grpo") as run:
        failed = distributed.gather_objects(run.step)
    if rank == 0:
        import json
        print(json.dumps([busy, resumed, full, failed]))
    distributed.shutdown()
"""


def test_two_ranks_share_a_run(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=patient(120), check=False)
    assert done.returncode == 0, done.stderr
    busy, resumed, full, failed = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert "is being written by process" in busy[0]
    assert busy[0] == busy[1]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_000002" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"early_0.bin", "early_1.bin", "late_0.bin", "late_1.bin", "sizes.txt", "state.json"}
    assert (tmp_path / "run" / "checkpoints" / "step_000002" / "sizes.txt").read_text() == "[100, 100]"
    told = [line for line in done.stderr.splitlines() if "corrupt checkpoint" in line]
    assert len(told) == 1 and "step_000003/late_1.bin has other content than was written" in told[0]
    assert resumed == [[2, {"step": 2, "rank": 0}]] * 2
    assert "step_000003 cannot be written: No space left on device" in full[0]
    assert full[0] == full[1]
    assert failed == [1, 1], "rank 0 waits for the slower rank's file, and seals"
    losses = [(record["step"], record["loss"]) for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[:3] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["corrupt-step_000003", "step_000002"]
