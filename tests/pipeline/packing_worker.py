"""A worker that can damage what it holds, and packs weights of any size as others do large ones. Test only."""

from __future__ import annotations

from megatron_r1.rollout.vllm import packed_linear
from tests.pipeline.corrupting_worker import CorruptingWorker

__all__ = ["CorruptingWorker"]

packed_linear.SMALLEST_PACKED = 1
