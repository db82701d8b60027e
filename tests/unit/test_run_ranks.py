"""One run folder and two ranks: both write into a checkpoint, share its hashing, and fail together on damage."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

from megatron_r1.runtime.launch import child_environment
from megatron_r1.runtime.metrics import read_metrics

WORKER = """
    import sys
    from pathlib import Path
    from megatron_r1.config.load import load_config
    from megatron_r1.errors import R1Error
    from megatron_r1.runtime import distributed
    from megatron_r1.runtime.device import resolve_device
    from megatron_r1.runtime.launch import read_launch
    from megatron_r1.runtime.run import Run

    folder = Path(sys.argv[1])
    distributed.initialize(read_launch(), resolve_device("cpu"), timeout_seconds=60)
    rank = distributed.rank()

    def write(path):
        (path / f"rank_{rank}.bin").write_bytes(bytes([rank]) * 100)

    def message(work):
        try:
            work()
        except R1Error as error:
            return str(error)

    with Run.open(folder, load_config(None, []), "grpo") as run:
        for step in run.steps(2, "grpo"):
            run.record(step, {"loss": float(rank)})
        run.checkpoint(2, write, {"rank": rank})
        latest = run.latest_checkpoint()
        states = distributed.gather_objects(run.load_state(latest))
        busy = distributed.gather_objects(message(lambda: Run.open(folder, load_config(None, []), "grpo")))
        if rank == 0:
            (latest / "rank_1.bin").write_bytes(bytes(100))
        distributed.barrier()
        damaged = distributed.gather_objects(message(lambda: run.load_state(latest)))
    if rank == 0:
        import json
        print(json.dumps([states, busy, damaged]))
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
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    states, busy, damaged = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert states == [{"rank": 0}, {"rank": 0}]
    assert "is being written by process" in busy[0]
    assert busy[0] == busy[1]
    assert "step_000002/rank_1.bin has other content than was written" in damaged[0]
    assert damaged[0] == damaged[1]
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [(1, 0.0), (2, 0.0)]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_000002" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"rank_0.bin", "rank_1.bin", "state.json"}
