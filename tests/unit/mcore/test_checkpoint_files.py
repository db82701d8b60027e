"""What a checkpoint's folder is written from: on a CPU the tensors themselves, without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import host
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture

host.activate("cpu")

from megatron_r1.mcore import checkpoint_files, parallel
from megatron_r1.mcore.adam_state import distributed_optimizers, state_tensors
from megatron_r1.mcore.checkpoint import load_policy, save_policy
from megatron_r1.mcore.checkpoint_files import storage_of_its_own
from megatron_r1.mcore.policy import MegatronPolicy, ReferencePolicy


@pytest.fixture(autouse=True)
def own_group() -> Iterator[None]:
    one_rank_world()
    yield
    dist.destroy_process_group()


def make(dtype: str, seed: int) -> MegatronPolicy:
    arch = full_architecture()
    layout = parallel.resolve_layout(ParallelConfig(), arch, 1, mtp=False)
    parallel.build_process_groups(layout, seed=1)
    return MegatronPolicy(
        arch, layout, RuntimeConfig(dtype=dtype), MoeTrainingConfig(), optimizer=OptimizerConfig(lr=1e-2), total_updates=10,
        seed=seed, device=torch.device("cpu"), micro_batch_tokens=256,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_save_writes_the_tensors_themselves(dtype: str, tmp_path: Path, monkeypatch) -> None:
    policy = make(dtype, seed=1)
    reference = ReferencePolicy(policy)
    optimizer = [tensor for part in distributed_optimizers(policy.optimizer) for tensor in state_tensors(part)]
    places = {span(tensor) for tensor in (*policy.local_state(), *reference.state, *optimizer)}
    written: list[torch.Tensor] = []

    def note(named: Iterable[tuple[str, torch.Tensor]]) -> None:
        written.extend(tensor for _, tensor in named)

    monkeypatch.setattr(checkpoint_files, "first_nonfinite", note)
    save_policy(policy, tmp_path, reference)
    assert sum(tensor.nbytes for tensor in written) > 4 * sum(tensor.nbytes for tensor in policy.local_state())
    copied = [tensor for tensor in written if not any(a <= tensor.data_ptr() < b for a, b in places)]
    assert not [tensor.shape for tensor in copied]
    bytes_of_files = sum(path.stat().st_size for path in tmp_path.rglob("*.distcp"))
    assert bytes_of_files < sum(tensor.nbytes + 4096 for tensor in written), "of a part of a buffer, the part alone"
    other = make(dtype, seed=2)
    load_policy(other, tmp_path, ReferencePolicy(other))
    assert all(torch.equal(*both) for both in zip(policy.local_state(), other.local_state(), strict=True))


def span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_a_part_of_a_buffer_has_a_storage_of_its_own_in_the_same_memory(dtype: torch.dtype) -> None:
    buffer = torch.arange(24).to(dtype)
    for part in (buffer[6:18].view(3, 4), buffer[5], torch.nn.Parameter(buffer.float())[2:5]):
        same = storage_of_its_own(part)
        assert same.data_ptr() == part.data_ptr()
        assert same.untyped_storage().nbytes() == part.nbytes and not same.requires_grad
        assert (same.dtype, same.shape) == (part.dtype, part.shape) and same.tolist() == part.tolist()
    for part in (buffer.view(4, 6)[:, :3], buffer[7:7]):
        assert storage_of_its_own(part) is part, "it has gaps, or nothing"
