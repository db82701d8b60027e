"""Every kind of Adam that Megatron-Core has: what it holds, that it computes the same, and that each resumes what another saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import host
from megatron_r1.mcore.state_bytes import StateBytes, optimizer_bytes
from megatron_r1.training.pretrain import loss_over
from megatron_r1.types import MicroBatch
from tests.adams import PLAIN, FusedAdam, adams_of_a_gpu, is_on_host
from tests.one_rank import one_rank_world
from tests.random_weights import full_architecture

host.activate("cpu")


from megatron_r1.mcore import adam_state, parallel
from megatron_r1.mcore.adam_state import create_moments, distributed_optimizers, held_state, state_tensors
from megatron_r1.mcore.checkpoint import load_policy, save_policy
from megatron_r1.mcore.policy import MegatronPolicy

ARCH = full_architecture(mtp=1)
KINDS: dict[str, dict[str, Any]] = {
    "device": {},
    "aware": {"use_precision_aware_optimizer": True},
    "bf16": {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
    "half on host": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    "on host": {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True},
}
MOE = MoeTrainingConfig(bias_update_rate=1e-3, aux_loss_coeff=1e-2, mtp_loss_scale=0.3, mtp_trains_trunk=True)
ROWS = [
    MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(2, 16), torch.arange(16).expand(2, -1))
    for ids in torch.randint(ARCH.vocab_size, (2, 2, 17), generator=torch.Generator().manual_seed(3))
]


def make(kind: str, seed: int = 7) -> MegatronPolicy:
    one_rank_world()
    parallel.build_process_groups(parallel.Layout(), seed=1)
    return MegatronPolicy(
        ARCH, parallel.Layout(), RuntimeConfig(dtype="bf16"), MOE, optimizer=OptimizerConfig(lr=0.1, eps=1.0), total_updates=9,
        seed=seed, temperature=0.7, device=torch.device("cpu"), micro_batch_tokens=32, packed=False,
        megatron=MegatronConfig(**PLAIN | KINDS[kind]), ema_decay=0.9,
    )  # fmt: skip


def update(policy: MegatronPolicy) -> None:
    stats = policy.train_on_micro_batches(ROWS, loss_over(64))
    squares = sum(metric.value**2 for name, metric in stats.metrics.items() if name.startswith("grad_norm/"))
    assert squares**0.5 == pytest.approx(stats.grad_norm, rel=1e-5), "every gradient is of a kind, whatever it is a gradient of"


def state(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """What Adam holds of every parameter of the model, in fp32."""
    names = {parameter: name for name, parameter in policy.modules[0].named_parameters()}
    return {
        f"{names[parameter]} {what}": tensor.detach().float().clone()
        for part in distributed_optimizers(policy.optimizer)
        for parameter in part.model_param_group_index_map
        for what, tensor in held_state(part, parameter).items()
    }


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference, as a share of the largest number of each tensor."""
    assert one.keys() == other.keys() and len(one) > 60
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp_min(1e-12)) for name in one)


@dataclass
class Trained:
    """A policy whose weights were loaded after its moments were made, and which made three updates."""

    policy: MegatronPolicy
    first: dict[str, torch.Tensor]  #: what Adam held after one of them
    last: dict[str, torch.Tensor]  #: what it holds


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    """One of each kind."""
    found = {}
    with adams_of_a_gpu():
        loaded = {
            name: value.clone() for name, value in make("device", seed=8).modules[0].state_dict().items() if value is not None
        }
        for kind in KINDS:
            policy = make(kind)
            policy.modules[0].load_state_dict(loaded, strict=False)
            policy.take_loaded_weights()
            update(policy)
            first = state(policy)
            update(policy)
            update(policy)
            found[kind] = Trained(policy, first, state(policy))
    return found


def test_each_kind_makes_the_update_of_the_first(trained: dict[str, Trained]) -> None:
    parts = {kind: list(distributed_optimizers(one.policy.optimizer)) for kind, one in trained.items()}
    assert [isinstance(of_kind[0].optimizer, FusedAdam) for of_kind in parts.values()] == [True, True, True, False, False]
    expected = trained["device"].first
    assert apart(trained["aware"].first, expected) == 0.0
    for kind in ("half on host", "on host"):
        assert apart(trained[kind].first, expected) < 1e-5, f"{kind}: torch's rounding is another"
    low = {name: value if name.endswith(" param") else value.bfloat16().float() for name, value in expected.items()}
    assert apart(trained["bf16"].first, low) == 0.0
    for kind, one in trained.items():
        assert any(not torch.equal(value, one.first[name]) for name, value in one.last.items())
        for part in parts[kind]:
            for parameter in part.model_param_group_index_map:
                held = held_state(part, parameter)
                rounded = held["param"].bfloat16().view(-1)
                assert torch.equal(rounded, parameter.detach().view(-1)), "weights are rounded master weights"
                width = torch.bfloat16 if kind == "bf16" else torch.float32
                assert (held["param"].dtype, held["exp_avg"].dtype, held["exp_avg_sq"].dtype) == (torch.float32, width, width)
        average, of_device = one.policy.average, trained["device"].policy.average
        average.settle()
        of_device.settle()
        for mine, theirs in zip(average.average, of_device.average, strict=True):
            assert (mine - theirs).abs().max() <= 2e-2 * theirs.abs().max(), "the average is one of master weights"


def test_a_rank_holds_as_many_bytes_as_planned(trained: dict[str, Trained]) -> None:
    for kind, one in trained.items():
        weights = sum(parameter.numel() for parameter in one.policy.modules[0].parameters())
        parts = list(distributed_optimizers(one.policy.optimizer))
        held = sum(tensor.nbytes for part in parts for tensor in state_tensors(part))
        each = [held_state(part, parameter) for part in parts for parameter in part.model_param_group_index_map]
        away = sum(tensor.nbytes for of_one in each if is_on_host(of_one["param"]) for tensor in of_one.values())
        switches = one.policy.switches
        planned = StateBytes.of(weights, bf16=True, moments=switches.moments, on_host=switches.optimizer_on_host)
        assert held == optimizer_bytes(weights, moments=switches.moments)
        # Whole tensors go to the host, until its share is reached.
        assert planned.optimizer == pytest.approx(held - away, abs=weights * 12 * 0.25), kind
        assert planned.host == pytest.approx(away * 16 / 12, abs=weights * 16 * 0.25)
        assert bool(away) == (kind in ("on host", "half on host"))
        if kind != "half on host":
            assert planned.optimizer == held - away and planned.host * 12 == away * 16
        assert planned.update == (8 * weights if kind == "bf16" else 0)


#: the last one is trained on
RESUMED = [("half on host", "on host"), ("bf16", "device"), ("device", "half on host"), ("device", "bf16"), ("bf16", "bf16")]


def counts(policy: MegatronPolicy) -> set[int]:
    """How many updates Adam believes to have made, of every parameter or group."""
    found = set()
    for part in distributed_optimizers(policy.optimizer):
        for adam in getattr(part.optimizer, "sub_optimizers", [part.optimizer]):
            found |= {int(moments["step"]) for moments in adam.state.values() if "step" in moments}
            found |= {group["step"] for group in adam.param_groups if group["params"] and "step" in group}
    return found


@pytest.mark.parametrize(("saved", "resumed"), RESUMED)
def test_a_checkpoint_of_one_kind_is_resumed_by_another(
    trained: dict[str, Trained], saved: str, resumed: str, tmp_path: Path
) -> None:
    policy, held = trained[saved].policy, trained[saved].last
    if resumed == "bf16" and saved != "bf16":
        held = {name: value if name.endswith(" param") else value.bfloat16().float() for name, value in held.items()}
    with adams_of_a_gpu():
        save_policy(policy, tmp_path)
        again = make(resumed, seed=9)
        load_policy(again, tmp_path)
        found = state(again)
        assert found.keys() == held.keys() and all(torch.equal(found[name], held[name]) for name in held)
        assert counts(again) == {3}
        if saved == resumed:
            update(again)
            update(policy)
            assert all(torch.equal(value, state(again)[name]) for name, value in state(policy).items()), "as if it had gone on"


def test_moments_are_zero_whatever_the_optimizer() -> None:
    """Megatron-Core makes those of another Adam than torch's from memory as it was."""
    weight = torch.nn.Parameter(torch.ones(3))
    adam = SimpleNamespace(state={}, param_groups=[{"params": [weight]}])

    def load_state_dict(_: object) -> None:
        adam.state[weight] = {name: torch.full((3,), float("nan")) for name in ("exp_avg", "exp_avg_sq")}

    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    part = SimpleNamespace(
        optimizer=adam, is_stub_optimizer=False, state_dict=dict, load_state_dict=load_state_dict, config=config
    )  # fmt: skip
    create_moments(SimpleNamespace(chained_optimizers=[part]))
    assert all(moment.eq(0).all() for moment in adam.state[weight].values()) and len(adam.state[weight]) == 2
    adam.state[weight]["exp_avg"].fill_(1)
    create_moments(SimpleNamespace(chained_optimizers=[part]))
    assert adam.state[weight]["exp_avg"].eq(1).all(), "moments that are there stay"
    assert adam_state.STATE_NAMES == ("param", "exp_avg", "exp_avg_sq")
