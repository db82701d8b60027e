"""Which of Megatron-Core's switches a run has on, and why the others are off. Pure: Megatron-Core is not imported.

`resolve_switches` turns the section `megatron` into fields of Megatron-Core's own configs, for one layout and machine. A switch
that is left at null is on where nothing stands against it, and off on a CPU; one that is asked for where something does is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.switch_rules import (
    OBJECTIONS,
    Machine,
    SwitchContext,
    check_choices,
    lack_of_flex,
    lack_of_fp8,
    lack_of_graphs,
    lacks,
)

#: of positions that a rank's products get in FP8: tiles of 128, also across positions when weights' gradients are made
FP8_TOKENS = 128
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Switches:
    """Fields of Megatron-Core's configs."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)  #: number formats as "fp32" or "bf16"
    fuse_engine_gradients: bool = False  #: of Transformer Engine's layers alone, where Apex has no kernel for the others
    pad_multiple: int = 1  #: of what a rank has of a micro-batch's positions
    on: tuple[str, ...] = ()  #: names of those that are on, for whoever asks

    @property
    def moments(self) -> tuple[int, int]:
        """Bytes a parameter of Adam's first and second moment."""
        first, second = (_BYTES[self.optimizer.get(name, "fp32")] for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
        return first, second

    @property
    def optimizer_on_host(self) -> float:
        """Share of the parameters that the host updates."""
        return float(self.optimizer.get("optimizer_offload_fraction", 0.0))

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
    check_choices(config, work, machine)
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
        transformer |= {"cuda_graph_impl": config.cuda_graph_impl, "cuda_graph_scope": _graph_scope(config)}
    ddp = {name: is_on[name] for name in ("overlap_grad_reduce", "overlap_param_gather")} if work.trains else {}
    return Switches(
        transformer,
        ddp,
        _optimizer_fields(config, is_on),
        fuse_engine_gradients=is_on["gradient_accumulation_fusion"] and not fuses_all,
        pad_multiple=FP8_TOKENS if config.fp8 is not None else 1,
        on=tuple(_name_those_on(config, is_on, batched)),
    )


def describe_defaults(machine: Machine) -> list[tuple[str, str]]:
    """(switch, whether this machine has it on by itself, or what it lacks), whatever the model and layout."""
    lines = []
    for name in OBJECTIONS:
        lack = next(lacks(name, machine), None)
        default = MegatronConfig.model_fields[name].default
        if lack is not None:
            lines.append((name, f"off: {lack}"))
        elif default is None and machine.device == "cuda":
            lines.append((name, "on, where the model and the layout have it"))
        else:
            lines.append((name, f"off; megatron.{name}=true turns it on"))
    for value, key, lack in (
        ("flex", "moe_token_dispatcher_type", lack_of_flex(machine)),
        ("blockwise FP8", "fp8", lack_of_fp8("blockwise", machine)),
        ("transformer_engine", "cuda_graph_impl", lack_of_graphs("transformer_engine", machine)),
        ("local", "cuda_graph_impl", lack_of_graphs("local", machine)),
    ):
        lines.append((key, f"{value} cannot be had: {lack}" if lack else f"{value} can be had"))
    return lines


def _decide(name: str, asked: bool | None, config: MegatronConfig, work: SwitchContext, machine: Machine) -> bool:
    """Whether a switch is on. Raises ConfigError if it is asked for in vain."""
    if asked is False:
        return False
    if asked is None and machine.device == "cpu":
        # Transformer Engine's layers, which tests also run on a CPU, go with their own experts.
        return name == "moe_grouped_gemm" and machine.transformer_engine is not None and work.arch.experts is not None
    objection = next(lacks(name, machine), None) or next(OBJECTIONS[name](config, work), None)
    if objection is not None and asked:
        raise ConfigError(f"megatron.{name}=true does not fit: {objection}; leave it unset")
    return objection is None


def _graph_scope(config: MegatronConfig) -> list[str]:
    """What is captured, as Megatron-Core takes it: nothing said means whole layers."""
    return [] if config.cuda_graph_impl == "local" else list(config.cuda_graph_scope or ["attn"])


def _optimizer_fields(config: MegatronConfig, is_on: Mapping[str, bool]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if is_on["use_precision_aware_optimizer"] or is_on["optimizer_cpu_offload"]:
        # Without it an optimizer on the host would leave a second copy of its master weights on the device, which loading the
        # model's weights renews and no update reads. Remainders of 16 bits would be no master weights that a checkpoint can hold.
        fields |= {"use_precision_aware_optimizer": True, "store_param_remainders": False}
        fields |= {"exp_avg_dtype": config.exp_avg_dtype, "exp_avg_sq_dtype": config.exp_avg_sq_dtype}
    if is_on["optimizer_cpu_offload"]:
        names = ("optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d")
        fields |= {name: getattr(config, name) for name in names}
    return fields


def _name_those_on(config: MegatronConfig, is_on: Mapping[str, bool], batched: bool) -> Iterator[str]:
    for name in (name for name, value in is_on.items() if value):
        if name == "use_precision_aware_optimizer":
            yield f"{name} (moments {config.exp_avg_dtype}, {config.exp_avg_sq_dtype})"
        elif name == "optimizer_cpu_offload":
            yield f"{name} ({config.optimizer_offload_fraction:g} of the optimizer)"
        else:
            yield name
    if config.cross_entropy_loss_fusion:
        yield "cross_entropy_loss_fusion"
    if batched:
        yield "batch_p2p_comm"
    if config.moe_token_dispatcher_type != "alltoall":
        yield f"moe_token_dispatcher_type={config.moe_token_dispatcher_type}"
    if config.fp8 is not None:
        yield f"fp8={config.fp8} ({config.fp8_recipe})"
    if config.cuda_graph_impl != "none":
        yield f"cuda_graph_impl={config.cuda_graph_impl} ({', '.join(_graph_scope(config)) or 'whole layers'})"
