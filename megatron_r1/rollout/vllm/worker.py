"""What the engine's workers can do beyond vLLM: report exactly which weights they hold.

vLLM imports this module in every worker process before it builds the model, so fixes and transfer back end are set up here, and
signals at which vLLM would end a worker are left to the rank.
"""

from __future__ import annotations

import threading

import torch
from vllm.platforms import current_platform

from megatron_r1.rollout.verify_weights import HeldReport
from megatron_r1.rollout.vllm.cpu_fixes import apply_fixes
from megatron_r1.rollout.vllm.held_weights import CONSTANT_BUFFERS, Held, read_derived, read_held
from megatron_r1.rollout.vllm.nccl_transfer import register_nccl_transfer
from megatron_r1.rollout.vllm.packed_linear import find_packed
from megatron_r1.rollout.vllm.shared_memory import register_transfer
from megatron_r1.runtime.heap import keep_freed_memory
from megatron_r1.runtime.interrupt import leave_to_rank
from megatron_r1.weights.checksum import checksum

if current_platform.is_cpu():
    apply_fixes()
    keep_freed_memory()
register_transfer()
register_nccl_transfer()
if threading.current_thread() is threading.main_thread():
    leave_to_rank()


class HeldWeights:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    def held_weights(self, sent_dtypes: dict[str, str]) -> HeldReport:
        """Checksums of everything this worker holds.

        Args:
            sent_dtypes: Hugging Face name -> dtype that was sent. A tensor that vLLM keeps in a wider type is narrowed back.
        """
        model = self.model_runner.model
        report = HeldReport()
        explained: set[int] = set()
        with torch.no_grad():
            for held in read_held(model):
                explained.add(id(held.source))
                _add_checksum(report, held, getattr(torch, sent_dtypes.get(held.name, "float32")))
            for name, held, expected in read_derived(model):
                explained.add(id(held))
                if held.shape != expected.shape or checksum(held) != checksum(expected.to(held.dtype)):
                    report.underived.append(name)
            report.underived += [f"{name}.weight, packed" for name, linear in find_packed(model) if not linear.is_current()]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(CONSTANT_BUFFERS):
                report.constants[name] = checksum(tensor)
            elif id(tensor) not in explained:
                report.uncovered.append(name)
        return report


def _add_checksum(report: HeldReport, held: Held, sent_dtype: torch.dtype) -> None:
    tensor = held.read()
    if tensor.dtype != sent_dtype and tensor.dtype == torch.float32:
        narrowed = tensor.to(sent_dtype)
        if not torch.equal(narrowed.to(tensor.dtype), tensor):
            report.contradictions.append(held.name)
        tensor = narrowed
    inner = tensor[0].numel() // tensor.shape[1] if held.axis == 1 else 0
    value = checksum(tensor, held.start if held.axis == 0 else 0, held.start * inner)
    known = report.replicated if held.axis is None else report.sharded
    if known.setdefault(held.name, value) != value:
        report.contradictions.append(held.name)
