"""Which of vLLM's model runners an engine takes, for the doctor.

Both give each request its own seed, which results here rest on. Runner V1 draws seeded requests one after the other in Python, a
loop over all sequences of a step; V2 draws them in one kernel.
"""

from __future__ import annotations

import subprocess
import sys

from megatron_r1.runtime.doctor import DeviceCheck
from megatron_r1.runtime.launch import child_environment

_SECONDS = 300.0
_MARK = "model runner: "


def runner_check() -> DeviceCheck:
    """Ask vLLM in a process of its own: its import takes seconds, and a broken one may end the process."""
    return DeviceCheck("vLLM's model runner", _ask_vllm, "install the vLLM that docs/cluster.md names")


def describe_runner(asked: bool | None, has_triton: bool) -> str:
    """What vLLM 0.32 takes for an engine of this project, none of whose settings V2 lacks.

    Args:
        asked: VLLM_USE_V2_MODEL_RUNNER, if it is set.
    """
    is_v2 = has_triton if asked is None else asked
    why = "Triton is there" if has_triton else "Triton is missing"
    if asked is not None:
        why = f"VLLM_USE_V2_MODEL_RUNNER={int(asked)}"
    speed = "seeded requests are drawn in one kernel" if is_v2 else "seeded requests are drawn one by one in Python, slow"
    return f"V{2 if is_v2 else 1} ({why}): {speed}"


def _ask_vllm() -> str:
    command = [sys.executable, "-m", "megatron_r1.rollout.vllm.runner"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=_SECONDS, check=False)
    said = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not said:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with exit code {done.returncode}"]
        raise RuntimeError(f"vLLM does not load: {last[0]}")
    return said[0]


def _tell_runner() -> None:
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    print(_MARK + describe_runner(envs.VLLM_USE_V2_MODEL_RUNNER, HAS_TRITON))


if __name__ == "__main__":
    _tell_runner()
