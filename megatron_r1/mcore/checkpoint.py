"""Write and read a policy with its optimizer as a Megatron distributed checkpoint, which any layout can load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.errors import CheckpointError
from megatron_r1.mcore import host, parallel
from megatron_r1.mcore.policy import MegatronPolicy, ReferencePolicy

host.require_active()

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

_SCHEDULE_FILE = "schedule.json"


def save_policy(policy: MegatronPolicy, folder: Path, reference: ReferencePolicy | None = None) -> None:
    """Write weights, optimizer and schedule below `folder`, collectively.

    Args:
        policy: what is trained.
        folder: exists and is empty; the caller renames it when every rank is done.
        reference: also kept, since it may be older than the policy.
    """
    _save(_state(policy, with_optimizer=policy.optimizer is not None), folder / "policy")
    if reference is not None:
        with policy.holding(reference.state):
            _save(_state(policy, with_optimizer=False), folder / "reference")
    if dist.get_rank() == 0:
        (folder / _SCHEDULE_FILE).write_text(json.dumps({"updates": policy.updates}))


def load_policy(policy: MegatronPolicy, folder: Path, reference: ReferencePolicy | None = None) -> None:
    """Read what `save_policy` wrote, on the same or another layout, collectively.

    Raises:
        CheckpointError: the folder does not hold a checkpoint of this model, or cannot be read.
    """
    if reference is not None:
        _load(policy, folder / "reference", with_optimizer=False)
        reference.refresh()
    _load(policy, folder / "policy", with_optimizer=policy.optimizer is not None)
    policy.updates = json.loads((folder / _SCHEDULE_FILE).read_text())["updates"]
    if policy.scheduler is not None:
        policy.scheduler.num_steps = policy.updates
        policy.scheduler.step(0)


def load_policy_weights(policy: MegatronPolicy, folder: Path) -> None:
    """Take only the weights from a checkpoint, whatever layout and dtype it was written with, collectively.

    Args:
        policy: its optimizer, where it has one, starts from these weights.
        folder: what `save_policy` or a conversion wrote.

    Raises:
        CheckpointError: the folder does not hold a checkpoint of this model, or cannot be read.
    """
    _load(policy, folder / "policy", with_optimizer=False)
    if policy.optimizer is not None:
        policy.optimizer.reload_model_params()


def _metadata() -> dict[str, Any]:
    # fully_reshardable: the optimizer state is stored by parameter, so that another layout can load it.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel.groups().dp_cp,
    }


def _state(policy: MegatronPolicy, with_optimizer: bool, is_loading: bool = False) -> dict[str, Any]:
    metadata = _metadata()
    names = ["model"] if len(policy.modules) == 1 else [f"model{i}" for i in range(len(policy.modules))]
    state: dict[str, Any] = {n: m.sharded_state_dict(metadata=metadata) for n, m in zip(names, policy.modules, strict=True)}
    if with_optimizer:
        state["optimizer"] = policy.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def _save(state: dict[str, Any], folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), ("torch_dist", 1))


def _load(policy: MegatronPolicy, folder: Path, with_optimizer: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is missing: this checkpoint does not hold what the run needs; delete it to use an older one"
        )
    if with_optimizer:
        _create_optimizer_state(policy)
    try:
        loaded = dist_checkpointing.load(_state(policy, with_optimizer, is_loading=True), str(folder))
    except (CheckpointingException, RuntimeError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{folder} cannot be loaded into this model: {reason[0] if reason else type(error).__name__}"
        ) from error
    for i, module in enumerate(policy.modules):
        module.load_state_dict(loaded["model" if len(policy.modules) == 1 else f"model{i}"], strict=True)
    if with_optimizer:
        policy.optimizer.load_state_dict(loaded["optimizer"])


def _create_optimizer_state(policy: MegatronPolicy) -> None:
    """Adam creates its moments in the first step; a checkpoint needs them to be there to be loaded into."""
    for parameter, state in _adam_states(policy):
        if not state:
            zeros = torch.zeros_like(parameter.data)
            state.update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())


def _adam_states(policy: MegatronPolicy) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, optimizer.optimizer.state[parameter]
