"""The average of the weights: its numbers, through a checkpoint to the bit, and as a model of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.conversion.compare import compare_folders
from megatron_r1.conversion.export_hf import export_folder
from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.mcore import host
from megatron_r1.runtime.checkpoints import manifest_entry, seal
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import MicroBatch
from megatron_r1.weights.hf import CONFIG, HfFolder
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture

host.activate("cpu")

from megatron_r1.mcore import parallel
from megatron_r1.mcore.checkpoint import load_policy, save_policy
from megatron_r1.mcore.policy import MegatronPolicy

DECAY = 0.75
ARCHITECTURE = full_architecture(mtp=1)


def build(dtype: str = "fp32", decay: float | None = DECAY, seed: int = 7) -> MegatronPolicy:
    one_rank_world()
    parallel.build_process_groups(parallel.Layout(), seed=1)
    moe = MoeTrainingConfig(bias_update_rate=1e-3)  # multi-token prediction is not trained, and has no average
    return MegatronPolicy(
        ARCHITECTURE, parallel.Layout(), RuntimeConfig(dtype=dtype), moe, optimizer=OptimizerConfig(lr=1e-2), total_updates=9,
        seed=seed, device=torch.device("cpu"), micro_batch_tokens=32, packed=False, ema_decay=decay,
    )  # fmt: skip


def update(policy: MegatronPolicy, number: int) -> dict[str, torch.Tensor]:
    """One update on its own tokens; the weights after it."""
    ids = torch.randint(130, (2, 17), generator=torch.Generator().manual_seed(number))
    positions = torch.arange(16).expand(2, -1)
    policy.train_on_micro_batches(
        [MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(2, 16), positions)], loss_over(32)
    )
    return {name: tensor.clone() for name, tensor in policy.weights()}


def save(policy: MegatronPolicy, folder: Path) -> Path:
    """A complete checkpoint."""
    work = folder.with_name("work")
    work.mkdir()
    save_policy(policy, work)
    (work / CONFIG).write_text(json.dumps(ARCHITECTURE.to_hf_config(1, 2, "float32")))
    files = {str(path.relative_to(work)): manifest_entry(path) for path in work.rglob("*") if path.is_file()}
    seal(work, folder, {"files": files})
    return folder


def is_averaged(name: str) -> bool:
    """All but what is not trained; a folder repeats embedding and head in the layer of multi-token prediction."""
    is_copy = name.endswith(("embed_tokens.weight", "shared_head.head.weight"))
    return is_copy or not name.startswith("model.layers.5.") and not name.endswith("e_score_correction_bias")


def test_the_average_its_checkpoint_and_its_model(tmp_path: Path) -> None:
    policy = build()
    expected = {name: tensor.clone() for name, tensor in policy.weights()}
    for number in range(3):
        after = update(policy, number)
        expected = {name: torch.lerp(expected[name], tensor, 1 - DECAY) for name, tensor in after.items()}
    saved = save(policy, tmp_path / "step_000003")

    resumed = build(seed=8)
    load_policy(resumed, saved)
    for run in (policy, resumed):
        update(run, 3)
        assert run.average is not None
        run.average.settle()
    assert policy.average is not None and resumed.average is not None
    assert all(torch.equal(*pair) for pair in zip(policy.average.average, resumed.average.average, strict=True))

    dist.destroy_process_group()  # a command is a process of its own
    export_folder(saved, tmp_path / "average", None, 10**9, of_average=True)
    average = HfFolder(tmp_path / "average")
    moved = 0
    for name, tensor in after.items():
        stored = average.read(name)
        assert torch.equal(stored, expected[name] if is_averaged(name) else tensor), name
        moved += not torch.equal(stored, tensor)
    assert moved > 50, "the average is another model than the last one"
    assert "equal" in compare_folders(tmp_path / "average", saved, of_average=True)
    with pytest.raises(ConversionError, match="differ between"):
        compare_folders(tmp_path / "average", saved)
    export_folder(saved, tmp_path / "last", None, 10**9)
    assert all(torch.equal(HfFolder(tmp_path / "last").read(name), tensor) for name, tensor in after.items())


def test_of_bf16_the_master_weights_are_averaged() -> None:
    policy = build("bf16")
    assert policy.average is not None
    before = [average.clone() for average in policy.average.average]
    update(policy, 0)
    policy.average.settle()
    changed = [not torch.equal(*pair) for pair in zip(before, policy.average.average, strict=True)]
    assert all(average.dtype == torch.float32 for average in policy.average.average) and any(changed)


def test_a_checkpoint_without_an_average_has_none_to_export(tmp_path: Path) -> None:
    saved = save(build(decay=None), tmp_path / "step_000001")
    dist.destroy_process_group()
    with pytest.raises(CheckpointError, match="holds no average of the weights: only runs with pretrain.ema_decay have one"):
        export_folder(saved, tmp_path / "average", None, 10**9, of_average=True)
    assert not (tmp_path / "average").exists()
