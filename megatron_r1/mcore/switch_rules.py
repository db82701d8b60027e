"""What stands against Megatron-Core's switches: what a machine lacks, and what a model, a layout or another switch excludes.

Pure: Megatron-Core is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture

_FP8_RECIPES = {"blockwise": ("2.3", 9), "mxfp8": ("2.1", 10), "tensorwise": ("2.2", 9), "delayed": ("1.0", 9)}  # TE, GPU


@dataclass(frozen=True)
class Machine:
    """What the switches need to know of a machine."""

    device: Literal["cpu", "cuda"]
    transformer_engine: str | None = None  #: its version; None: it is not used
    apex_gradients: bool = False  #: whether Apex was built with fused_weight_gradient_mlp_cuda
    deep_ep: bool = False
    capability: int = 0  #: major compute capability of the GPU: 9 is Hopper, 10 Blackwell

    def has_engine(self, version: str) -> bool:
        """Whether Transformer Engine is there and at least this new."""
        if self.transformer_engine is None:
            return False
        try:
            return Version(self.transformer_engine) >= Version(version)
        except InvalidVersion:
            return False


def find_machine(device: Literal["cpu", "cuda"], has_transformer_engine: bool, capability: int) -> Machine:
    """This machine, by the packages that are installed."""
    if device == "cpu":
        return Machine("cpu")
    version = None
    if has_transformer_engine:
        version = metadata.version("transformer-engine")
    return Machine("cuda", version, _is_there("fused_weight_gradient_mlp_cuda"), _is_there("deep_ep"), capability)


def planned_machine(device: Literal["cpu", "cuda"], fp8_recipe: str = "blockwise") -> Machine:
    """A machine that has all that a device can have, for plans that are made elsewhere."""
    _, capability = _FP8_RECIPES[fp8_recipe]
    return Machine("cpu") if device == "cpu" else Machine("cuda", "99", apex_gradients=True, deep_ep=True, capability=capability)


@dataclass(frozen=True)
class SwitchContext:
    """What is trained, and how."""

    arch: Architecture
    layout: Layout
    runtime: RuntimeConfig
    moe: MoeTrainingConfig
    packed: bool  #: whether micro-batches hold sequences of any length
    trains: bool = True


# What a machine may lack.

_ENGINE = {
    "moe_grouped_gemm": "1.11", "moe_permute_fusion": "2.1", "moe_router_fusion": "2.7", "apply_rope_fusion": "1.4",
    "use_precision_aware_optimizer": "2.4",
}  # fmt: skip
_CUDA = ("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm", "optimizer_cpu_offload")
_GRAPH_ENGINE = "2.10"  # Transformer Engine from which on captured graphs can be dropped


def lacks(name: str, machine: Machine) -> Iterator[str]:
    if name in _ENGINE and not machine.has_engine(_ENGINE[name]):
        yield f"it needs CUDA with Transformer Engine {_ENGINE[name]} or newer"
    if name in _CUDA and (lack := lack_of_cuda(machine)):
        yield lack
    if name == "gradient_accumulation_fusion" and not (machine.has_engine("1.0") or machine.apex_gradients):
        yield "it needs CUDA with Transformer Engine, or Apex with its fused_weight_gradient_mlp_cuda"


def lack_of_cuda(machine: Machine) -> str | None:
    return "it needs CUDA" if machine.device == "cpu" else None


def lack_of_flex(machine: Machine) -> str | None:
    return None if machine.device == "cuda" and machine.deep_ep else "it needs CUDA with the package deep_ep"


def lack_of_graphs(impl: str, machine: Machine) -> str | None:
    """What a machine lacks for `megatron.cuda_graph_impl`."""
    if impl == "transformer_engine" and not machine.has_engine(_GRAPH_ENGINE):
        return f"it needs CUDA with Transformer Engine {_GRAPH_ENGINE} or newer"
    return lack_of_cuda(machine)


def lack_of_fp8(recipe: str, machine: Machine) -> str | None:
    version, capability = _FP8_RECIPES[recipe]
    if machine.has_engine(version) and machine.capability >= capability:
        return None
    return f"it needs Transformer Engine {version} or newer and a GPU of compute capability {capability}.0 or higher"


# What a model or a layout may have against a switch.


def _nothing_against(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    yield from ()


def _lack_of_experts(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    if work.arch.experts is None:
        yield f"{work.arch.model_type} has no experts"


def _router_fusion(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    yield from _lack_of_experts(config, work)
    rule = work.arch.router_rule()
    if rule.best_of_group is not None:
        yield f"the groups of this {work.arch.model_type}'s experts are scored in a way that the kernel does not have"
    if rule.normalize_one:
        yield "the weight of a single expert is normalised in a way that the kernel does not have"


def _rope_fusion(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    if work.arch.ATTENTION == "latent" and work.arch.megatron_settings().get("rope_type") != "yarn":
        yield "with latent attention Megatron-Core has it for YaRN alone, and the model has no rope_scaling"
    if work.arch.ATTENTION != "latent" and work.arch.yarn_scaling() is not None:
        yield "its kernel does not scale sine and cosine, as YaRN of grouped-query attention does"


def _gradient_fusion(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    if not work.trains:
        yield "nothing is trained"
    if work.arch.mtp_depth and work.moe.mtp_loss_scale > 0 and not work.moe.mtp_trains_trunk:
        yield "multi-token prediction that trains its head alone (moe.mtp_trains_trunk=false) holds copies without gradient sums"


def _shared_overlap(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    yield from _lack_of_experts(config, work)
    if work.arch.experts is not None and not work.arch.experts.shared_width:
        yield f"this {work.arch.model_type} has no shared experts"
    if config.moe_token_dispatcher_type != "alltoall":
        yield f"megatron.moe_token_dispatcher_type={config.moe_token_dispatcher_type} does not have it"
    if config.overlap_moe_expert_parallel_comm:
        yield "megatron.overlap_moe_expert_parallel_comm=true excludes it"


def _expert_overlap(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    yield from _lack_of_experts(config, work)
    layout = work.layout
    if layout.ep == 1:
        yield "parallel.ep is 1: tokens stay where they are"
    if work.runtime.dtype != "bf16":
        yield f"runtime.dtype={work.runtime.dtype}, and Megatron-Core has it for bf16"
    if layout.pp > 1 and layout.vpp == 1:
        yield f"parallel.pp={layout.pp} needs virtual stages, parallel.vpp above 1"
    if work.runtime.recompute == "full":
        yield "runtime.recompute=full excludes it"
    if work.packed:
        yield "packed sequences: its schedule does not tell the router which sequence a token is of"
    if work.arch.mtp_depth and (work.arch.mtp_depth > 1 or layout.pp == 1):
        yield "multi-token prediction needs a depth of 1 and parallel.pp above 1 with it"
    if work.arch.mtp_depth and work.moe.mtp_loss_scale > 0 and not work.moe.mtp_trains_trunk:
        yield "multi-token prediction that trains its head alone (moe.mtp_trains_trunk=false): its schedule trains the whole model"


def _lack_of_training(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    if not work.trains:
        yield "nothing is trained"


def _own_weights(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    yield from _lack_of_training(config, work)
    if work.runtime.dtype != "bf16":
        yield f"runtime.dtype={work.runtime.dtype}, whose weights are their own master weights"


def _optimizer_on_host(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    yield from _own_weights(config, work)
    if "optimizer" in work.runtime.offload:
        yield "runtime.offload names the optimizer, too, which would bring it to the device for every update"
    if "bf16" in (config.exp_avg_dtype, config.exp_avg_sq_dtype):
        yield "Megatron-Core keeps the moments of an optimizer on the host in fp32, whatever exp_avg_dtype and exp_avg_sq_dtype say"


#: switches that are on or off -> what a model, a layout or another switch has against them
OBJECTIONS: Mapping[str, Any] = {
    "moe_grouped_gemm": _lack_of_experts,
    "moe_permute_fusion": _lack_of_experts,
    "moe_router_fusion": _router_fusion,
    "bias_swiglu_fusion": _nothing_against,
    "apply_rope_fusion": _rope_fusion,
    "gradient_accumulation_fusion": _gradient_fusion,
    "overlap_grad_reduce": _lack_of_training,
    "overlap_param_gather": _lack_of_training,
    "moe_shared_expert_overlap": _shared_overlap,
    "overlap_moe_expert_parallel_comm": _expert_overlap,
    "use_precision_aware_optimizer": _own_weights,
    "optimizer_cpu_offload": _optimizer_on_host,
}


def check_choices(config: MegatronConfig, work: SwitchContext, machine: Machine) -> None:
    """Raises ConfigError for what is no switch of two positions."""
    layout = work.layout
    if config.moe_token_dispatcher_type == "flex":
        _refuse_for(lack_of_flex(machine), "megatron.moe_token_dispatcher_type=flex")
        _refuse_for(next(_lack_of_experts(config, work), None), "megatron.moe_token_dispatcher_type=flex")
        _refuse_for("parallel.ep is 1" if layout.ep == 1 else None, "megatron.moe_token_dispatcher_type=flex")
    if config.batch_p2p_comm and layout.vpp > 1:
        raise ConfigError(
            f"megatron.batch_p2p_comm=true does not fit parallel.vpp={layout.vpp}: batched messages are paired wrongly over two "
            "ranks; leave it unset"
        )
    if config.fp8 is not None:
        asked = f"megatron.fp8={config.fp8} with fp8_recipe={config.fp8_recipe}"
        _refuse_for(lack_of_fp8(config.fp8_recipe, machine), asked)
        _refuse_for(None if work.runtime.dtype == "bf16" else f"runtime.dtype={work.runtime.dtype}, it needs bf16", asked)
    if config.cross_entropy_loss_fusion and work.runtime.dtype != "bf16":
        _refuse_for(
            "it rounds gradients to bf16", f"megatron.cross_entropy_loss_fusion=true with runtime.dtype={work.runtime.dtype}"
        )
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(config, name) != "fp32" and not config.use_precision_aware_optimizer:
            raise ConfigError(f"megatron.{name}={getattr(config, name)} needs megatron.use_precision_aware_optimizer=true")
    if not config.optimizer_cpu_offload:
        for name in ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"):
            if getattr(config, name) != MegatronConfig.model_fields[name].default:
                raise ConfigError(f"megatron.{name}={getattr(config, name)} needs megatron.optimizer_cpu_offload=true")
    if config.cuda_graph_impl != "none":
        asked = f"megatron.cuda_graph_impl={config.cuda_graph_impl}"
        _refuse_for(lack_of_graphs(config.cuda_graph_impl, machine), asked)
        _refuse_for(next(_graphs(config, work), None), asked)


def _graphs(config: MegatronConfig, work: SwitchContext) -> Iterator[str]:
    yield from _lack_of_training(config, work)
    if work.packed:
        yield "packed micro-batches have no two shapes alike"
    if work.runtime.recompute == "full":
        yield "runtime.recompute=full excludes it"
    if "gradients" in work.runtime.offload:
        yield "runtime.offload moves the gradients, and a graph writes them where they were when it was captured"
    if config.cuda_graph_impl == "local":
        if work.arch.experts is not None:
            yield "it captures whole layers, and experts' numbers of tokens vary: transformer_engine captures parts"
        if config.cuda_graph_scope is not None:
            yield "it captures whole layers, and megatron.cuda_graph_scope is for parts, which transformer_engine captures"
    elif work.runtime.dtype != "bf16":
        yield f"runtime.dtype={work.runtime.dtype}, and Megatron-Core captures bf16 alone"
    elif "moe_router" in (config.cuda_graph_scope or ()):
        yield "moe_router in cuda_graph_scope: the router counts its choices outside of a graph"


def _refuse_for(lack: str | None, asked: str) -> None:
    if lack is not None:
        raise ConfigError(f"{asked} does not fit: {lack}; leave it unset")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
