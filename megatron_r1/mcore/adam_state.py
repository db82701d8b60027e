"""What Adam holds of each parameter, whichever Adam it is: fp32 or bf16 moments, on the device or partly on the host.

Megatron-Core 0.16.1 has four: torch's AdamW and Transformer Engine's or Apex's, whose master weights are the parameters that they
update; Transformer Engine's with moments of fewer bits (`megatron.use_precision_aware_optimizer`) and one of torch's on the host
beside one on the device (`megatron.optimizer_cpu_offload`), which update the weights themselves and hold master weights beside the
moments. Megatron-Core's own ways to read and set these would not do: they give copies of bf16 moments, leave master weights as they
were when weights are loaded, and count a resumed update as the first one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_r1.mcore.active import require_active

require_active()

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

_MASTER, _MOMENTS = "master_param", ("exp_avg", "exp_avg_sq")
STATE_NAMES = ("param", *_MOMENTS)  #: master weights, float32, and both moments, float32 or bfloat16


def distributed_optimizers(optimizer: ChainedOptimizer) -> Iterator[DistributedOptimizer]:
    """The distributed optimizers in the chain that have parameters on this rank's model."""
    return (part for part in optimizer.chained_optimizers if not part.is_stub_optimizer)


def updated_tensor(part: DistributedOptimizer, parameter: torch.Tensor) -> torch.Tensor:
    """What the optimizer updates of the range that this rank holds of a model's parameter."""
    group, place = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][place]


def held_state(part: DistributedOptimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The live tensors of `STATE_NAMES` for the range that this rank holds of a model's parameter; see `create_moments`."""
    updated = updated_tensor(part, parameter)
    state = part.optimizer.state[updated]
    return {"param": state[_MASTER] if holds_master_weights(part) else updated, **{name: state[name] for name in _MOMENTS}}


def state_tensors(part: DistributedOptimizer) -> Iterator[torch.Tensor]:
    """Master weights and moments that this rank holds."""
    for parameter in part.model_param_group_index_map:
        yield from held_state(part, parameter).values()


def holds_master_weights(part: DistributedOptimizer) -> bool:
    """Whether Adam updates the model's weights itself, from master weights of its own."""
    return part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def create_moments(optimizer: ChainedOptimizer) -> None:
    """Make Adam's moments, which are zero before the first update, and the master weights that it holds itself.

    Adam itself makes them in that update, when an engine beside the trainer has taken what memory there was.
    """
    for part in distributed_optimizers(optimizer):
        adam = part.optimizer
        if isinstance(adam, HybridDeviceOptimizer):
            for of_device in adam.sub_optimizers:
                _make_zero(of_device)
            adam._sync_sub_optimizers_state_to_hdo()
        elif holds_master_weights(part):
            for parameter in _parameters(adam):
                if not adam.state[parameter]:
                    adam.initialize_state(parameter, False)
        elif counts_per_parameter(adam):
            _make_zero(adam)
        elif not adam.state:
            part.load_state_dict(part.state_dict())  # with uninitialised tensors
            for moments in adam.state.values():
                for name in _MOMENTS:
                    moments[name].zero_()


def take_weights(optimizer: ChainedOptimizer) -> None:
    """Have master weights start from the model's weights, which were loaded."""
    optimizer.reload_model_params()
    with torch.no_grad():
        for part in distributed_optimizers(optimizer):
            if holds_master_weights(part):  # Megatron-Core would leave Transformer Engine's as they are
                for parameter in part.model_param_group_index_map:
                    held_state(part, parameter)["param"].copy_(updated_tensor(part, parameter))


def set_updates(part: DistributedOptimizer, updates: int) -> None:
    """Have the next update be the one after `updates`."""
    adam = part.optimizer
    for one in adam.sub_optimizers if isinstance(adam, HybridDeviceOptimizer) else [adam]:
        if counts_per_parameter(one):
            # torch's AdamW counts in place, so each parameter needs its own tensor.
            for moments in one.state.values():
                moments["step"] = torch.tensor(float(updates))
        else:
            for group in one.param_groups:
                group["step"] = updates


def counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """Whether this is torch's AdamW; Transformer Engine's and Apex's Adam count per parameter group."""
    return isinstance(adam, torch.optim.AdamW)


def _make_zero(adam: torch.optim.Optimizer) -> None:
    for parameter in _parameters(adam):
        if not adam.state[parameter]:
            zeros = torch.zeros_like(parameter.data)
            step = {"step": torch.tensor(0.0)} if counts_per_parameter(adam) else {}
            adam.state[parameter].update(step, exp_avg=zeros, exp_avg_sq=zeros.clone())


def _parameters(adam: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in adam.param_groups for parameter in group["params"])
