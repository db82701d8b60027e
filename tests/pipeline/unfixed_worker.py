"""A worker on vLLM as it comes, except that linear weights can be read. Test only."""

from __future__ import annotations

from megatron_r1.rollout.vllm import cpu_fixes as vllm_cpu

vllm_cpu.FIXES = tuple(fix for fix in vllm_cpu.FIXES if fix.name == "keep linear weights")

from megatron_r1.rollout.vllm.worker import HeldWeights

__all__ = ["HeldWeights"]
