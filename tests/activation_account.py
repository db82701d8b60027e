"""What one rank of any layout keeps of forward passes until their backward passes, by torch's own account, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.data.packing import pack_samples
from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from megatron_r1.types import MicroBatch, TrainingSample

host.activate("cpu")

from megatron.core import parallel_state

from megatron_r1.mcore import megatron_model, meta, parallel
from megatron_r1.mcore.megatron_model import MegatronModel


class Account:
    """Storages that autograd holds, and how many bytes they are together, now and at most. Weights are not counted."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._held: dict[int, list] = {}  # storage -> [it, how often it is held]
        self.most = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the account during the block."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor):
            yield

    def take(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._weights:
            return
        self._held.setdefault(storage._cdata, [storage, 0])[1] += 1
        # A storage that is computed again is empty until then.
        self.most = max(self.most, sum(held.nbytes() for held, _ in self._held.values()))

    def give(self, storage: torch.UntypedStorage) -> None:
        entry = self._held.get(storage._cdata)
        if entry is not None:
            entry[1] -= 1
            if entry[1] == 0:
                del self._held[storage._cdata]


class _Kept:
    def __init__(self, tensor: torch.Tensor, account: Account) -> None:
        self.tensor, self._account = tensor, account
        account.take(tensor.untyped_storage())

    def __del__(self) -> None:
        self._account.give(self.tensor.untyped_storage())


def most_kept(
    arch: Architecture, lengths: list[int], micro_batch_tokens: int, *, world_size: int = 1, rank: int = 0, recompute: str = "none",
    modules: tuple[str, ...] = (), mtp: bool = False, packed: bool = True, **sizes: int,
) -> int:  # fmt: skip
    """Bytes at the fullest moment of an update's passes, in float32.

    Args:
        lengths: targets of the samples of this rank, which are packed; not `packed`: rows of a micro-batch each, all alike.
    """
    layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=mtp)
    if dist.is_initialized():
        dist.destroy_process_group()
    with meta._quick_start():
        dist.init_process_group(dist.Backend.FAKE, store=FakeStore(), rank=rank, world_size=world_size)
        try:
            parallel.build_process_groups(layout, seed=0)
            chosen = {"recompute_modules": list(modules)} if modules else {}
            runtime = RuntimeConfig(recompute=recompute, device="cpu", **chosen)
            model = _model(arch, layout, runtime, MoeTrainingConfig(mtp_loss_scale=0.3 if mtp else 0.0), micro_batch_tokens, packed)
            batches = _micro_batches(arch, lengths, micro_batch_tokens, layout, packed)
            account = Account([parameter for module in model.modules for parameter in module.parameters()])
            with account.open():
                model._run(batches, lambda output, batch: (output.sum(), {}), 1, forward_only=False, beside=None)
            return account.most
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _model(
    arch: Architecture, layout: parallel.Layout, runtime: RuntimeConfig, moe: MoeTrainingConfig, tokens: int, packed: bool
) -> MegatronModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_model, "Shares", lambda place: None)  # it asks the other ranks, of whom nobody answers
        return MegatronModel(
            arch, layout, runtime, moe, optimizer=OptimizerConfig(lr=1e-3), total_updates=1, seed=0, device=torch.device("cpu"),
            micro_batch_tokens=tokens, packed=packed,
        )  # fmt: skip


def _micro_batches(arch: Architecture, lengths: list[int], tokens: int, layout: parallel.Layout, packed: bool) -> list[MicroBatch]:
    random = np.random.default_rng(0)
    if packed:
        samples = [
            TrainingSample(random.integers(0, arch.vocab_size, length + 1).astype(np.int32), slice(0, length)) for length in lengths
        ]
        return list(
            pack_samples(
                samples, max_tokens=tokens, dp_size=1, pad_multiple=layout.pad_multiple, count_multiple=layout.count_multiple
            )[0]
        )
    rows = tokens // lengths[0]
    assert len(set(lengths)) == 1 and len(lengths) % rows == 0, "rows of a micro-batch are alike"
    ids = torch.from_numpy(random.integers(0, arch.vocab_size, (len(lengths) // rows, rows, lengths[0])))
    positions = torch.arange(lengths[0]).expand(rows, -1)
    return [MicroBatch(batch, batch, torch.ones(batch.shape), positions) for batch in ids]
