"""What a worker of vLLM's server gets from this project: the changes without which a machine without CUDA computes otherwise."""

from __future__ import annotations

from vllm.platforms import current_platform

from megatron_r1.rollout.vllm.cpu_fixes import apply_fixes

if current_platform.is_cpu():
    apply_fixes()


class ServedWorker:
    """Mixed into vLLM's worker (`worker_extension_cls`), which imports this module before it builds the model."""
