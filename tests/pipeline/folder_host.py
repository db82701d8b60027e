"""The engine process for tests: starts from exported folders, engine after engine, and imports vLLM once. Test only."""

from __future__ import annotations

import gc
import sys
from typing import Any
from unittest.mock import patch

import vllm
from vllm.distributed import cleanup_dist_env_and_memory

from megatron_r1.rollout.vllm import engine as vllm_engine
from megatron_r1.rollout.vllm import main as vllm_main
from tests.pipeline.engine_cases import FolderOptions


class FolderEngine(vllm_engine.VllmEngine):
    """Begins with the weights of a folder, which vLLM reads as it reads any published one; ends the engine before it."""

    running: FolderEngine | None = None

    def __init__(self, options: FolderOptions) -> None:
        def open_folder(_: str, **arguments: Any) -> vllm.LLM:
            self._end_running()
            return vllm.LLM(str(options.folder), **arguments | {"load_format": "safetensors"})

        version = options.vllm_version or vllm.__version__
        with patch.object(vllm_engine, "LLM", open_folder), patch.object(vllm, "__version__", version):
            super().__init__(options)
        FolderEngine.running = self

    def _end_running(self) -> None:
        if FolderEngine.running is not None:
            del FolderEngine.running.llm
            FolderEngine.running = None
            gc.collect()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    vllm_engine.VllmEngine = FolderEngine
    vllm_main.run_engine(int(sys.argv[1]), int(sys.argv[2]))
