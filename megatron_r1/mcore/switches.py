"""Which of Megatron-Core's switches a run has on, and why the others are off. Pure: Megatron-Core is not imported.

`resolve_switches` turns the section `megatron` into fields of Megatron-Core's own configs, for one layout and machine. A switch
that is left at null is on where nothing stands against it, and off on a CPU; one that is asked for where something does is refused.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture

#: of positions that a rank's products get in FP8: tiles of 128, also across positions when weights' gradients are made
FP8_TOKENS = 128
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


@dataclass(frozen=True)
class Switches:
    """Fields of Megatron-Core's configs."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    fuse_engine_gradients: bool = False  #: of Transformer Engine's layers alone, where Apex has no kernel for the others
    pad_multiple: int = 1  #: of what a rank has of a micro-batch's positions
    on: tuple[str, ...] = ()  #: names of those that are on, for whoever asks

    def require_tiles(self, layout: Layout, tokens: int | None) -> int:
        """What the length of a packed micro-batch is a multiple of; `tokens`: of one that is not packed.

        Raises ConfigError if a rank's part of `tokens` does not fill whole tiles of FP8.
        """
        multiple = self.pad_multiple * layout.tp * layout.cp
        if tokens is not None and tokens % multiple:
            raise ConfigError(
                f"megatron.fp8 needs micro-batches of a multiple of {multiple} tokens on this layout, they have {tokens}: change "
                "pretrain.sequence_length or pretrain.micro_batch_size, or leave megatron.fp8 unset"
            )
        return math.lcm(layout.pad_multiple, multiple)


def resolve_switches(config: MegatronConfig, work: SwitchContext, machine: Machine) -> Switches:
    """The fields for one job.

    Raises:
        ConfigError: something that is asked for does not fit the layout or the machine; one line.
    """
    is_on = {name: _decide(name, getattr(config, name), config, work, machine) for name in OBJECTIONS}
    if is_on["overlap_param_gather"] and not is_on["overlap_grad_reduce"]:
        if config.overlap_param_gather:
            raise ConfigError("megatron.overlap_param_gather=true needs megatron.overlap_grad_reduce=true")
        is_on["overlap_param_gather"] = False
    _check_choices(config, work, machine)
    interleaved = work.layout.vpp > 1
    batched = not interleaved if config.batch_p2p_comm is None else config.batch_p2p_comm
    fuses_all = is_on["gradient_accumulation_fusion"] and machine.apex_gradients
    transformer: dict[str, Any] = {
        "bias_activation_fusion": is_on["bias_swiglu_fusion"],
        "apply_rope_fusion": is_on["apply_rope_fusion"],
        "gradient_accumulation_fusion": fuses_all,
        "cross_entropy_loss_fusion": config.cross_entropy_loss_fusion,
        "batch_p2p_comm": batched,
        "overlap_p2p_comm": interleaved,
    }
    if work.arch.experts is not None:
        names = ("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap")
        transformer |= {name: is_on[name] for name in names}
        transformer |= {
            "moe_token_dispatcher_type": config.moe_token_dispatcher_type,
            "overlap_moe_expert_parallel_comm": is_on["overlap_moe_expert_parallel_comm"],
        }
        if config.moe_token_dispatcher_type == "flex":
            transformer["moe_flex_dispatcher_backend"] = "deepep"
    if config.fp8 is not None:
        transformer |= {"fp8": config.fp8, "fp8_recipe": config.fp8_recipe}
    if config.cuda_graph_impl != "none":
        transformer |= {"cuda_graph_impl": config.cuda_graph_impl, "cuda_graph_scope": list(config.cuda_graph_scope)}
    ddp = {name: is_on[name] for name in ("overlap_grad_reduce", "overlap_param_gather")} if work.trains else {}
    return Switches(
        transformer,
        ddp,
        fuse_engine_gradients=is_on["gradient_accumulation_fusion"] and not fuses_all,
        pad_multiple=FP8_TOKENS if config.fp8 is not None else 1,
        on=tuple(_name_those_on(config, is_on, batched)),
    )


def describe_defaults(machine: Machine) -> list[tuple[str, str]]:
    """(switch, whether this machine has it on by itself, or what it lacks), whatever the model and layout."""
    lines = []
    for name in OBJECTIONS:
        lacks = next((lack for lack in _lacks(name, machine)), None)
        default = MegatronConfig.model_fields[name].default
        if lacks is not None:
            lines.append((name, f"off: {lacks}"))
        elif default is None and machine.device == "cuda":
            lines.append((name, "on, where the model and the layout have it"))
        else:
            lines.append((name, f"off; megatron.{name}=true turns it on"))
    for value, key, lacks in (
        ("flex", "moe_token_dispatcher_type", _lack_of_flex(machine)),
        ("blockwise FP8", "fp8", _lack_of_fp8("blockwise", machine)),
        ("local", "cuda_graph_impl", _lack_of_cuda(machine)),
    ):
        lines.append((key, f"{value} cannot be had: {lacks}" if lacks else f"{value} can be had"))
    return lines


def _decide(name: str, asked: bool | None, config: MegatronConfig, work: SwitchContext, machine: Machine) -> bool:
    """Whether a switch is on. Raises ConfigError if it is asked for in vain."""
    if asked is False:
        return False
    if asked is None and machine.device == "cpu":
        # Transformer Engine's layers, which tests also run on a CPU, go with their own experts.
        return name == "moe_grouped_gemm" and machine.transformer_engine is not None and work.arch.experts is not None
    objection = next(_lacks(name, machine), None) or next(OBJECTIONS[name](config, work), None)
    if objection is not None and asked:
        raise ConfigError(f"megatron.{name}=true does not fit: {objection}; leave it unset")
    return objection is None


def _name_those_on(config: MegatronConfig, is_on: Mapping[str, bool], batched: bool) -> Iterator[str]:
    yield from (name for name, value in is_on.items() if value)
    if config.cross_entropy_loss_fusion:
        yield "cross_entropy_loss_fusion"
    if batched:
        yield "batch_p2p_comm"
    if config.moe_token_dispatcher_type != "alltoall":
        yield f"moe_token_dispatcher_type={config.moe_token_dispatcher_type}"
    if config.fp8 is not None:
        yield f"fp8={config.fp8} ({config.fp8_recipe})"
    if config.cuda_graph_impl != "none":
        yield f"cuda_graph_impl={config.cuda_graph_impl} ({', '.join(config.cuda_graph_scope)})"


# What a machine may lack.

_ENGINE = {
    "moe_grouped_gemm": "1.11", "moe_permute_fusion": "2.1", "moe_router_fusion": "2.7", "apply_rope_fusion": "1.4",
}  # fmt: skip
_CUDA = ("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm")


def _lacks(name: str, machine: Machine) -> Iterator[str]:
    if name in _ENGINE and not machine.has_engine(_ENGINE[name]):
        yield f"it needs CUDA with Transformer Engine {_ENGINE[name]} or newer"
    if name in _CUDA and (lack := _lack_of_cuda(machine)):
        yield lack
    if name == "gradient_accumulation_fusion" and not (machine.has_engine("1.0") or machine.apex_gradients):
        yield "it needs CUDA with Transformer Engine, or Apex with its fused_weight_gradient_mlp_cuda"


def _lack_of_cuda(machine: Machine) -> str | None:
    return "it needs CUDA" if machine.device == "cpu" else None


def _lack_of_flex(machine: Machine) -> str | None:
    return None if machine.device == "cuda" and machine.deep_ep else "it needs CUDA with the package deep_ep"


def _lack_of_fp8(recipe: str, machine: Machine) -> str | None:
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
}


def _check_choices(config: MegatronConfig, work: SwitchContext, machine: Machine) -> None:
    """Raises ConfigError for what is no switch of two positions."""
    layout = work.layout
    if config.moe_token_dispatcher_type == "flex":
        _refuse_for(_lack_of_flex(machine), "megatron.moe_token_dispatcher_type=flex")
        _refuse_for(next(_lack_of_experts(config, work), None), "megatron.moe_token_dispatcher_type=flex")
        _refuse_for("parallel.ep is 1" if layout.ep == 1 else None, "megatron.moe_token_dispatcher_type=flex")
    if config.batch_p2p_comm and layout.vpp > 1:
        raise ConfigError(
            f"megatron.batch_p2p_comm=true does not fit parallel.vpp={layout.vpp}: batched messages are paired wrongly over two "
            "ranks; leave it unset"
        )
    if config.fp8 is not None:
        asked = f"megatron.fp8={config.fp8} with fp8_recipe={config.fp8_recipe}"
        _refuse_for(_lack_of_fp8(config.fp8_recipe, machine), asked)
        _refuse_for(None if work.runtime.dtype == "bf16" else f"runtime.dtype={work.runtime.dtype}, it needs bf16", asked)
    if config.cross_entropy_loss_fusion and work.runtime.dtype != "bf16":
        _refuse_for(
            "it rounds gradients to bf16", f"megatron.cross_entropy_loss_fusion=true with runtime.dtype={work.runtime.dtype}"
        )
    if config.cuda_graph_impl != "none":
        asked = f"megatron.cuda_graph_impl={config.cuda_graph_impl}"
        _refuse_for(_lack_of_cuda(machine), asked)
        _refuse_for("packed micro-batches have no two shapes alike" if work.packed else None, asked)
        _refuse_for("runtime.recompute=full excludes it" if work.runtime.recompute == "full" else None, asked)
        if "moe_router" in config.cuda_graph_scope:
            _refuse_for(next(_lack_of_experts(config, work), None), f"{asked} with moe_router in cuda_graph_scope")


def _refuse_for(lack: str | None, asked: str) -> None:
    if lack is not None:
        raise ConfigError(f"{asked} does not fit: {lack}; leave it unset")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
