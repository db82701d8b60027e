"""What the engine's workers can do beyond vLLM: report exactly which weights they hold.

vLLM imports this module in every worker process before it builds the model, so fixes and transfer back end are set up here, and
signals at which vLLM would end a worker are left to the rank.
"""

from __future__ import annotations

import threading

import torch
from vllm.platforms import current_platform

from megatron_r1.rollout.sync.verify_weights import HeldReport
from megatron_r1.rollout.vllm.cpu_fixes import apply_fixes
from megatron_r1.rollout.vllm.held_weights import CONSTANT_BUFFERS, read_derived, read_held
from megatron_r1.rollout.vllm.nccl_transfer import register_nccl_transfer
from megatron_r1.rollout.vllm.packed_linear import find_packed
from megatron_r1.rollout.vllm.shared_memory import register_transfer
from megatron_r1.runtime.heap import keep_freed_memory
from megatron_r1.runtime.interrupt import leave_to_rank
from megatron_r1.weights.checksum import checksum, shard_checksum
from megatron_r1.weights.shard_plan import Named, TakenPiece

if current_platform.is_cpu():
    apply_fixes()
    keep_freed_memory()
register_transfer()
register_nccl_transfer()
if threading.current_thread() is threading.main_thread():
    leave_to_rank()


class HeldWeights:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    def weight_boxes(self) -> list[Named]:
        """The boxes of Hugging Face tensors that this worker holds."""
        return self.weight_transfer_engine.live.boxes

    def take_plan(self, plans: list[list[list[TakenPiece]]], verifies: bool) -> None:
        """Know what buckets will hold.

        Args:
            plans: of all workers of the engine: bucket -> pieces.
            verifies: whether checksums come with them.
        """
        self.weight_transfer_engine.take_plan(plans[self.rank], verifies)

    def held_weights(self, verifies: bool) -> HeldReport:
        """What came with the last update, and whether all of it came.

        Args:
            verifies: look also at everything that does not come, but must fit what came, or stay.
        """
        model, transfer = self.model_runner.model, self.weight_transfer_engine
        report = transfer.report()
        if not verifies:
            return report
        explained: set[int] = set()
        reached = transfer.live.sources
        with torch.no_grad():
            for held in read_held(model):
                explained.add(id(held.source))
                if id(held.source) not in reached:
                    report.unreached.append(held.name)
            for name, held, expected in read_derived(model):
                explained.add(id(held))
                if held.shape != expected.shape or shard_checksum(held) != shard_checksum(expected.to(held.dtype)):
                    report.underived.append(name)
            report.underived += [f"{name}.weight, packed" for name, linear in find_packed(model) if not linear.is_current()]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(CONSTANT_BUFFERS):
                report.constants[name] = checksum(tensor)
            elif id(tensor) not in explained:
                report.uncovered.append(name)
        return report
