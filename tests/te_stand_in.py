"""A stand-in for Transformer Engine on machines without CUDA, for tests alone: its modules' names, attributes and extra state.

Megatron-Core's own wrappers (`megatron/core/extensions/transformer_engine.py`) are executed on top of it and put into Megatron's
own layer specs, so parameter names, sharding and checkpoint keys are the real ones. What the modules take, hold and mark follows
Transformer Engine 2.11.0 (2.17.1 has the same): `Linear`, `LayerNormLinear`, `GroupedLinear` and `RMSNorm` of
`transformer_engine/pytorch/module/`. Not there: FP8, overlapped communication, dropout. Attention is this project's own, which
holds no weight either.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

from megatron_r1.mcore import host

host.activate("cpu")

from megatron.core import utils
from megatron.core.extensions import transformer_engine as stock_wrappers
from megatron.core.extensions import transformer_engine_spec_provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import multi_latent_attention

from megatron_r1.mcore import specs, transformer_config
from megatron_r1.mcore.layers import CoreAttention

VERSION = "2.11.0"
_NO_FP8 = {"fp8_checkpoint": False}


class _Module(torch.nn.Module):
    """TransformerEngineBaseModule: without FP8 the extra state is an empty tensor of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8, self.fp8_calibration, self.fp8_meta = False, False, dict(_NO_FP8)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Nothing without FP8."""

    def get_extra_state(self) -> torch.Tensor:
        """Empty without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Transformer Engine would unpickle what is not empty."""
        assert state is None or state.numel() == 0


class _Parallel(_Module):
    """What linear layers share."""

    def __init__(
        self, in_features: int, out_features: int, *, sequence_parallel: bool, fuse_wgrad_accumulation: bool, tp_group: Any,
        tp_size: int, get_rng_state_tracker: Callable | None, init_method: Callable, bias: bool, return_bias: bool,
        parallel_mode: str | None, params_dtype: torch.dtype, device: str, rng_tracker_name: str | None = None,
        symmetric_ar_type: str | None = None, ub_name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not (return_bias or fuse_wgrad_accumulation or symmetric_ar_type), "not in the stand-in"
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.tp_group, self.tp_size, self.parallel_mode, self.use_bias = tp_group, tp_size, parallel_mode, bias
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self._make = {"dtype": params_dtype, "device": device}

    def _add(self, number: str) -> None:
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **self._make))
        # Also of a weight that is whole on every rank: `parallel_mode` None.
        set_tensor_model_parallel_attributes(weight, True, 1 if self.parallel_mode == "row" else 0, 1)
        setattr(self, f"weight{number}", weight)
        if self.use_bias:
            bias = torch.nn.Parameter(torch.zeros(self.out_features, **self._make))
            if self.parallel_mode == "column":
                set_tensor_model_parallel_attributes(bias, True, 0, 1)
            setattr(self, f"bias{number}", bias)

    def _product(self, x: torch.Tensor, number: str = "") -> torch.Tensor:
        return F.linear(x, getattr(self, f"weight{number}"), getattr(self, f"bias{number}") if self.use_bias else None)

    def _communicating(self, x: torch.Tensor) -> torch.Tensor:
        if self.parallel_mode == "column" and self.tp_size > 1:
            enter = (
                mappings.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else mappings.copy_to_tensor_model_parallel_region
            )
            x = enter(x, group=self.tp_group)
        y = self._product(x)
        if self.parallel_mode == "row" and self.tp_size > 1:
            leave = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region
            )
            y = leave(y, group=self.tp_group)
        return y


class Linear(_Parallel):
    """transformer_engine/pytorch/module/linear.py."""

    def __init__(self, in_features: int, out_features: int, **settings: Any) -> None:
        super().__init__(in_features, out_features, **settings)
        self._add("")

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """x W^T + b."""
        return self._communicating(x)


class LayerNormLinear(_Parallel):
    """transformer_engine/pytorch/module/layernorm_linear.py: the norm's weight is a parameter beside the linear layer's."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, normalization: str, return_layernorm_output: bool,
        zero_centered_gamma: bool, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, **settings)
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output, "not in the stand-in"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, **self._make))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self._add("")

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """norm(x) W^T + b."""
        return self._communicating(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class GroupedLinear(_Parallel):
    """transformer_engine/pytorch/module/grouped_linear.py: `weight0`, `weight1`, ..., one for each expert, and one extra state."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **settings: Any) -> None:
        super().__init__(in_features, out_features, **settings)
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            self._add(str(i))

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        """Every expert's product of its own rows."""
        return torch.cat([self._product(part, str(i)) for i, part in enumerate(x.split(m_splits))])


class RMSNorm(_Module):
    """transformer_engine/pytorch/module/rmsnorm.py."""

    def __init__(
        self,
        *,
        hidden_size: int,
        eps: float,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * weight."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class _DotProductAttention(CoreAttention):
    """Holds no weight, and an extra state that Megatron-Core's wrapper leaves out of sharded state dicts."""

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config, softmax_scale=softmax_scale, pg_collection=pg_collection)

    get_extra_state, set_extra_state = _Module.get_extra_state, _Module.set_extra_state

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Nothing."""
        return {}


@contextlib.contextmanager
def transformer_engine_layers() -> Iterator[None]:
    """Build layers as on a GPU with Transformer Engine: by Megatron-Core's specs, of its wrappers, over the stand-in."""
    wrappers = _load_wrappers()
    names = [name for name in vars(transformer_engine_spec_provider) if name.startswith("TE") and hasattr(wrappers, name)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_te_version", Version(VERSION))
        for name in names:
            patch.setattr(transformer_engine_spec_provider, name, getattr(wrappers, name))
        patch.setattr(transformer_engine_spec_provider, "TEDotProductAttention", _DotProductAttention)
        patch.setattr(gpt_layer_specs, "TENorm", wrappers.TENorm, raising=False)
        patch.setattr(gpt_layer_specs, "TESpecProvider", transformer_engine_spec_provider.TESpecProvider, raising=False)
        patch.setattr(multi_latent_attention, "TELinear", wrappers.TELinear)
        patch.setattr(multi_latent_attention, "TEColumnParallelLinear", wrappers.TEColumnParallelLinear)
        for module in (specs, transformer_config):
            patch.setattr(module, "on_transformer_engine", lambda: True)
        yield


@cache
def _load_wrappers() -> ModuleType:
    """A second copy of Megatron-Core's module of wrappers, executed as if Transformer Engine were installed."""
    engine = _package()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in engine.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(utils, "_te_version", None)
        name = "megatron_wrappers_of_te_stand_in"
        spec = spec_from_loader(name, host._Loader(name, stock_wrappers.__file__, [], retarget=True))
        wrappers = module_from_spec(spec)
        spec.loader.exec_module(wrappers)
    assert wrappers.HAVE_TE and wrappers.TEColumnParallelGroupedLinear is not None
    return wrappers


def _package() -> dict[str, ModuleType]:
    engine, pytorch, common = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch"), SimpleNamespace()
    fp8, router = ModuleType("transformer_engine.pytorch.fp8"), ModuleType("transformer_engine.pytorch.router")
    engine.__version__, engine.pytorch, engine.common = VERSION, pytorch, common
    common.recipe = SimpleNamespace(DelayedScaling=type("DelayedScaling", (), {}))
    for module in (engine, pytorch):
        module.__path__ = []  # packages without further modules: Megatron-Core tries several and goes on without
    pytorch.Linear, pytorch.LayerNormLinear, pytorch.GroupedLinear, pytorch.RMSNorm = (
        Linear,
        LayerNormLinear,
        GroupedLinear,
        RMSNorm,
    )
    pytorch.DotProductAttention = torch.nn.Module
    pytorch.distributed = SimpleNamespace(CudaRNGStatesTracker=object)
    pytorch.ops = SimpleNamespace(Sequential=object, FusibleOperation=object)  # in annotations
    fp8.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    fp8.fp8_autocast = lambda **_: contextlib.nullcontext()
    router.fused_compute_score_for_moe_aux_loss = router.fused_moe_aux_loss = router.fused_topk_with_score_function = None
    return {module.__name__: module for module in (engine, pytorch, fp8, router)}
