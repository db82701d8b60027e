"""Checkpoints do not depend on the layers that are used: Transformer Engine's (a stand-in here), or those for the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_r1 import cli
from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import CheckpointError
from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture
from megatron_r1.runtime.checkpoint_index import read_index
from megatron_r1.runtime.checkpoints import manifest_entry, seal
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import TrainingSample
from megatron_r1.weights.mapping import checkpoint_names
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture, further_families, llama_architecture, qwen2_architecture, write_random_model

host.activate("cpu")

from megatron_r1.mcore import checkpoint, parallel, provider
from megatron_r1.mcore.checkpoint import load_policy, load_policy_weights, save_policy, sharded_weights
from megatron_r1.mcore.policy import MegatronPolicy, ReferencePolicy
from tests.te_stand_in import transformer_engine_layers

MODELS = {"v3": full_architecture(), "qwen2": qwen2_architecture(), "llama": llama_architecture(), **further_families()}
LAYERS = {"cpu": nullcontext, "te": transformer_engine_layers}
#: What every kind of model has under another name in Transformer Engine's layers.
FUSED = {"latent": "linear_kv_up_proj.layer_norm_weight", "grouped_query": "linear_qkv.layer_norm_weight"}


@pytest.fixture(autouse=True)
def fresh_group() -> Iterator[None]:
    """Commands make a process group of their own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def make(arch: Architecture, layers: str, seed: int = 1, trains: bool = False) -> MegatronPolicy:
    """The whole model on this process."""
    one_rank_world()
    layout = parallel.resolve_layout(ParallelConfig(), arch, 1, mtp=False)
    parallel.build_process_groups(layout, seed=1)
    with LAYERS[layers]():
        return MegatronPolicy(
            arch, layout, RuntimeConfig(), MoeTrainingConfig(), optimizer=OptimizerConfig(lr=1e-2) if trains else None,
            total_updates=10, seed=seed, device=torch.device("cpu"), micro_batch_tokens=256,
        )  # fmt: skip


def update(policy: MegatronPolicy, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in (20, 9, 31)]
    samples = [TrainingSample(tokens, [1] * (len(tokens) - 1)) for tokens in ids]
    return policy.train_step(samples, loss_over(sum(sample.num_trained for sample in samples)))


def same_weights(a: MegatronPolicy, b: MegatronPolicy) -> bool:
    """Under their Hugging Face names, bit for bit."""
    left, right = dict(a.weights()), dict(b.weights())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def write_as_before(arch: Architecture, layers: str, hf: Path, folder: Path) -> MegatronPolicy:
    """Save what was saved until checkpoints had one form: the layers' own names, with their extra state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provider, "fused_names", lambda arch: {})
        patch.setattr(checkpoint, "sharded_weights", lambda m: m.sharded_state_dict(metadata=checkpoint.sharding_metadata()))
        policy = make(arch, layers, trains=True)
        policy.load_hf(hf)
        folder.mkdir()
        save_policy(policy, folder)
    return policy


def complete(folder: Path, hf: Path) -> Path:
    """Make a complete checkpoint of what a policy wrote."""
    shutil.copyfile(hf / "config.json", folder / "config.json")
    files = {str(path.relative_to(folder)): manifest_entry(path) for path in folder.rglob("*") if path.is_file()}
    seal(folder, folder.with_name("complete"), {"files": files})
    dist.destroy_process_group()  # a command is a process of its own
    return folder.with_name("complete")


@pytest.mark.parametrize("model", MODELS)
def test_tensors_have_the_same_keys_and_numbers(model: str) -> None:
    arch = MODELS[model]
    policies = {layers: make(arch, layers, seed=3) for layers in LAYERS}
    te = policies["te"].modules[0]
    names = te.state_dict()
    assert any(name.endswith(FUSED[arch.ATTENTION]) for name in names) and any(name.endswith("_extra_state") for name in names)
    assert any(name.endswith("experts.linear_fc1.weight1") for name in names) == (arch.experts is not None)
    stock = te.sharded_state_dict(metadata=checkpoint.sharding_metadata())
    assert any(name.endswith("experts.linear_fc1._extra_state1") for name in stock) == (arch.experts is not None)
    found = {}
    for layers, policy in policies.items():
        state = sharded_weights(policy.modules[0])
        found[layers] = sorted(
            (entry.key, tuple(getattr(entry, "global_offset", ())), tuple(entry.data.shape)) for entry in state.values()
        )
        assert not [name for name in state if "_extra_state" in name]
    assert found["te"] == found["cpu"], "and the keys of the CPU's layers are those on disks"
    assert same_weights(*policies.values()), "the initial weights do not depend on the layers"
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [p.modules[0](ids, torch.arange(24).expand_as(ids), None) for p in policies.values()]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "before", "after"), [("v3", "te", "te"), ("v3", "cpu", "te"), ("qwen3", "te", "cpu")])
def test_a_run_with_a_reference_goes_on_with_other_layers(model: str, before: str, after: str, tmp_path: Path) -> None:
    arch = MODELS[model]
    policy = make(arch, before, trains=True)
    reference = ReferencePolicy(policy)
    update(policy, 0)
    save_policy(policy, tmp_path, reference)
    old = [t.clone() for t in policy.local_state()]

    resumed = make(arch, after, seed=2, trains=True)
    kept = ReferencePolicy(resumed)
    load_policy(resumed, tmp_path, kept)
    assert same_weights(resumed, policy)
    with policy.holding(reference.state), resumed.holding(kept.state):
        assert same_weights(resumed, policy) and not all(map(torch.equal, policy.local_state(), old))
    for seed in (1, 2):
        want, got = update(policy, seed), update(resumed, seed)
        assert got.loss == pytest.approx(want.loss, abs=1e-5) and got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    kept.refresh()
    (tmp_path / "again").mkdir()
    save_policy(resumed, tmp_path / "again", kept)
    load_policy(policy, tmp_path / "again", reference)
    with policy.holding(reference.state):
        assert same_weights(policy, resumed)


@pytest.mark.parametrize(
    ("model", "written_by"), [*((model, "te") for model in ("v3", "deepseek_v2", "qwen2", "qwen3_moe")), ("v3", "cpu")]
)
def test_checkpoints_of_before_are_read(model: str, written_by: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By training with either layers, and by the converter."""
    arch = MODELS[model]
    hf = write_random_model(tmp_path / "hf", arch)
    policy = write_as_before(arch, written_by, hf, tmp_path / "written")
    names = read_index(tmp_path / "written/policy/.metadata").state_dict_metadata
    assert any(name.endswith(FUSED[arch.ATTENTION]) for name in names) == (written_by == "te")
    assert any("._extra_state" in name for name in names)
    for layers in LAYERS:
        weights, resumed = make(arch, layers, seed=2), make(arch, layers, seed=2, trains=True)
        load_policy_weights(weights, tmp_path / "written")
        load_policy(resumed, tmp_path / "written")
        assert same_weights(weights, policy) and same_weights(resumed, policy)
    folder = complete(tmp_path / "written", hf)
    assert cli.main(["convert", "verify", "--hf", str(hf), "--megatron", str(folder)]) == 0
    assert "are equal" in capfd.readouterr().out


@pytest.mark.parametrize("model", ["v3", "qwen3_moe"])
def test_conversion_serves_transformer_engine_both_ways(model: str, tmp_path: Path, capfd) -> None:
    arch = MODELS[model]
    hf = write_random_model(tmp_path / "hf", arch)
    assert cli.main(["convert", "import", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 0
    names = read_index(tmp_path / "m/policy/.metadata").state_dict_metadata
    assert not [name for name in names if "_extra_state" in name]
    policy, read = make(arch, "te", seed=2), make(arch, "te", seed=3)
    load_policy_weights(policy, tmp_path / "m")
    read.load_hf(hf)
    assert same_weights(policy, read)
    (tmp_path / "run").mkdir()
    save_policy(policy, tmp_path / "run")
    folder = complete(tmp_path / "run", hf)
    capfd.readouterr()
    assert cli.main(["convert", "export", "--megatron", str(folder), "--out", str(tmp_path / "back"), "--verify"]) == 0
    assert "are equal" in capfd.readouterr().out


def test_scaling_factors_of_fp8_are_not_lost_without_a_word() -> None:
    policy = make(MODELS["v3"], "te")
    layer = policy.modules[0].decoder.layers[0].self_attention.linear_proj
    layer.get_extra_state = lambda: torch.ones(3, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="layers.0.self_attention.linear_proj._extra_state holds scaling factors of FP8"):
        sharded_weights(policy.modules[0])


def test_names_of_a_checkpoint() -> None:
    arch = MODELS["qwen2"]
    ours, other = "decoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    stored = [other, f"optimizer.state.exp_avg.{other}", "decoder.layers.1.input_layernorm.weight", "output_layer.weight"]
    moment = "optimizer.state.exp_avg."
    assert checkpoint_names(stored, arch) == {ours: other, f"{moment}{ours}": f"{moment}{other}"}
    assert checkpoint_names([other, ours], arch) == {}, "a tensor under both names is not taken for one"
