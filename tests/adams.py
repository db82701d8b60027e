"""Stand-ins for the two kinds of Adam that need a GPU, for tests alone: Megatron-Core's own optimizer runs on top of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.mcore import host

host.activate("cpu")

from megatron.core import optimizer as megatron_optimizer
from megatron.core import utils
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

from megatron_r1.mcore import adam_state, host_cuda, host_rewrite, megatron_model
from megatron_r1.mcore.switch_rules import OBJECTIONS, Machine

HOPPER = Machine("cuda", "2.11.0", capability=9)
#: switches that a machine with a GPU would have on by itself, off
PLAIN = {name: False for name in OBJECTIONS if MegatronConfig.model_fields[name].default is None}


class FusedAdam(torch.optim.Optimizer):
    """transformer_engine/pytorch/optimizers/fused_adam.py of 2.11.0: what it takes, holds and counts. Not there: fp16, fp8."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, bias_correction: bool = True, adam_w_mode: bool = True, master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32, exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32, use_decoupled_grad: bool = False, store_param_remainders: bool = False,
    ) -> None:  # fmt: skip
        assert adam_w_mode and bias_correction and master_weight_dtype == torch.float32 and not store_param_remainders
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        """Zero moments, and the weights in fp32."""
        assert not store_param_remainders
        self.state[param] = {name: torch.zeros_like(param, dtype=dtype) for name, dtype in self._dtypes.items()}
        if self.master_weights:
            self.state[param]["master_param"] = param.clone().detach().float()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moments are fp32 while they are computed with; a group has one count."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    self.initialize_state(param, False)
                    state = self.state[param]
                grad = param.decoupled_grad if self.use_decoupled_grad else param.grad
                if grad is None:
                    continue
                weights = state["master_param"] if self.master_weights else param
                first, second = (state[name].float() for name in self._dtypes)
                first = first.lerp(grad, 1 - beta1)
                second = second * beta2 + grad.square() * (1 - beta2)
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                denominator = (second / (1 - beta2**step)).sqrt() + group["eps"]
                weights.sub_(group["lr"] * (first / (1 - beta1**step)) / denominator)
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)
                if self.master_weights:
                    param.copy_(weights)


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether a tensor counts as one on the host, while all others count as on the device."""
    return getattr(tensor, "counts_as_on_host", False)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    tensor.counts_as_on_host = True
    return tensor


def _to_float(tensor: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return _to_host(tensor.float()) if is_on_host(of) else tensor.float()


@contextlib.contextmanager
def adams_of_a_gpu() -> Iterator[None]:
    """Have a policy that is made in the block believe that it is on a GPU, with `FusedAdam` and a host beside the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_model, "this_machine", lambda: HOPPER)
        for module in (megatron_optimizer, distrib_optimizer, adam_state):
            patch.setattr(module, "HybridDeviceOptimizer", _load_hybrid())
        build = megatron_model.build_optimizer

        def build_with_engine(*arguments: Any) -> Any:
            with _transformer_engine():
                return build(*arguments)

        patch.setattr(megatron_model, "build_optimizer", build_with_engine)
        yield


@contextlib.contextmanager
def _transformer_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
            module = ModuleType(name)
            module.FusedAdam, module.__path__ = FusedAdam, []
            patch.setitem(sys.modules, name, module)
        patch.setattr(utils, "_te_version", Version(str(HOPPER.transformer_engine)))
        patch.setattr(megatron_optimizer, "Adam", FusedAdam)
        patch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(distrib_optimizer, "Adam", FusedAdam)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
        yield


@cache
def _load_hybrid() -> type:
    """Megatron-Core's optimizer on host and device, compiled so that it moves tensors to what counts as the host here."""
    source = Path(hybrid_optimizer.__file__).read_text()
    for theirs, ours, times in (
        ("param.is_cuda", "not is_on_host(param)", 3),
        ("param.detach().clone().cpu().pin_memory()", "to_host(param.detach().clone())", 1),
        ("param.detach().clone().float()", "to_float(param.detach().clone(), param)", 1),
        ("pin_memory=self.pin_cpu_grads", "pin_memory=False", 1),
    ):
        assert source.count(theirs) == times, theirs
        source = source.replace(theirs, ours)
    tree, _ = host_rewrite.rewrite(source.encode(), hybrid_optimizer.__file__)
    names: dict[str, Any] = {"is_on_host": is_on_host, "to_host": _to_host, "to_float": _to_float}
    names |= {host_rewrite.NAMESPACE: host_cuda, host_rewrite.TO_DEVICE: host_cuda.to_device, "__name__": hybrid_optimizer.__name__}
    exec(compile(tree, hybrid_optimizer.__file__, "exec"), names)  # noqa: S102
    return names["HybridDeviceOptimizer"]
