"""Main program of `megatron-r1 serve`: vLLM's own OpenAI-compatible server, which ends with the process that started it.

Run as `python -m megatron_r1.rollout.vllm.api_server PARENT_PID ARGUMENTS OF "vllm serve"`, in a session of its own.
"""

from __future__ import annotations

import sys

from megatron_r1.rollout.vllm.cpu_fixes import check_version
from megatron_r1.rollout.vllm.main import die_with_trainer


def run_api_server(parent_pid: int, arguments: list[str]) -> None:
    """Serve until a signal ends it. Raises DeviceError for another version of vLLM than the pinned one."""
    die_with_trainer(parent_pid)
    check_version()
    # Not `vllm.entrypoints.cli.main`, which looks for a package of the name vllm: the build for CPUs has another.
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm", *arguments]
    main()


if __name__ == "__main__":
    run_api_server(int(sys.argv[1]), sys.argv[2:])
