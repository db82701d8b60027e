"""What is planned: a stage of a config on so many devices, resolved by the functions that the run itself uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.config.schema import Config
from megatron_r1.conversion.model_shape import FOR_WANT, require_language_model, reward_architecture, shape_of_model
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout, resolve_layout, smallest_layout
from megatron_r1.mcore.switch_rules import SwitchContext, planned_machine
from megatron_r1.mcore.switches import Switches, resolve_switches
from megatron_r1.model.architecture import Architecture
from megatron_r1.plan.devices import CPU, Accelerator, device_named

Stage = Literal["pretrain", "sft", "reward-model", "grpo", "rejection", "convert"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DEFAULT_DEVICE = "H800"
_TRAINED = ("pretrain", "sft", "reward-model", "grpo")


@dataclass(frozen=True)
class Job:
    """A stage on so many devices."""

    stage: Stage
    config: Config
    arch: Architecture  #: of the model that is trained, sampled or converted
    shape_from: str  #: where the shape was found
    layout: Layout  #: of the model; of a pretraining with phases, without their `cp`; unsplit where nothing is trained
    switches: Switches  #: of Megatron-Core, those that are on if the machines have all that they need
    device: Accelerator | None  #: None: ranks on CPUs
    nodes: int
    devices_per_node: int  #: and so ranks of a node

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.layout.world_size

    @property
    def device_name(self) -> str:
        """As it is asked for."""
        return CPU if self.device is None else self.device.name

    @property
    def runtime(self) -> RuntimeConfig:
        """The section `runtime`."""
        return self.config.runtime

    @property
    def section(self) -> Any:
        """The stage's own section: of pretrain, sft, reward_model, grpo, curation.rejection; None: a conversion has none."""
        return _section(self.stage, self.config)

    @property
    def is_trained(self) -> bool:
        """Whether the stage has an optimizer."""
        return self.stage in _TRAINED

    @property
    def optimizer(self) -> OptimizerConfig | None:
        """The section `optimizer` of the stage; None: it trains nothing."""
        return self.section.optimizer if self.is_trained else None

    @property
    def moe(self) -> MoeTrainingConfig:
        """How router and multi-token prediction are trained."""
        return _moe(self.stage, self.config)

    @property
    def trains_mtp(self) -> bool:
        """Whether multi-token prediction is trained, and so computed."""
        return self.moe.mtp_loss_scale > 0 and self.arch.mtp_depth > 0

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.runtime.dtype == "bf16" else 4


def read_job(
    config: Config,
    stage: Stage,
    gpu: str | None = None,
    nodes: int | None = None,
    *,
    devices_per_node: int = 8,
    world_size: int | None = None,
) -> Job:
    """The job that a config asks for.

    Args:
        gpu: a name of `devices.DEVICES`, or "cpu"; None: "cpu" with `runtime.device=cpu`, else H800, the paper's.
        nodes: None: as few as `world_size`, or else the layout, needs.
        devices_per_node: ranks of a node, of which a job that needs fewer has fewer.
        world_size: ranks, where the last node is not full.

    Raises:
        ConfigError: an unknown device, a layout that does not divide model or ranks, a switch that does not fit.
        CheckpointError: `model.weights` is here and has no config.json, or one that cannot be read.
    """
    name = gpu or (CPU if config.runtime.device == "cpu" else DEFAULT_DEVICE)
    device = None if name.lower() == CPU else device_named(name)
    arch, shape_from = shape_of_model(config.model)
    try:
        return _resolve(config, stage, arch, shape_from, device, nodes, devices_per_node, world_size)
    except ConfigError as error:
        if FOR_WANT not in shape_from:
            raise
        raise ConfigError(f"{error} (the shape is that of {shape_from})") from None


def _resolve(
    config: Config,
    stage: Stage,
    arch: Architecture,
    shape_from: str,
    device: Accelerator | None,
    nodes: int | None,
    devices_per_node: int,
    world_size: int | None,
) -> Job:
    if stage == "reward-model":
        arch = reward_architecture(arch, config.model.weights, config.reward_model.kind)
    elif stage != "convert":
        require_language_model(arch, config.model.weights)
    trains = stage in _TRAINED
    parallel = config.parallel if trains else ParallelConfig()  # engines and conversions go by other sizes, on any number of ranks
    stages = config.megatron.pipeline_model_parallel_layout if trains else None
    if world_size is None and nodes is None:
        world_size = smallest_layout(parallel, arch, stages).world_size
    elif world_size is None:
        world_size = (nodes or 1) * devices_per_node
    packed = trains and (stage != "pretrain" or config.pretrain.mask_documents)
    moe = _moe(stage, config)
    mtp = stage in ("pretrain", "sft", "grpo") and moe.mtp_loss_scale > 0 and arch.mtp_depth > 0
    layout = resolve_layout(parallel, arch, world_size, mtp=mtp, stages=stages)
    work = SwitchContext(arch, layout, config.runtime, moe, packed, trains)
    machine = planned_machine("cpu" if device is None else "cuda", config.megatron.fp8_recipe)
    switches = resolve_switches(config.megatron, work, machine) if trains else Switches()
    needed = -(-world_size // devices_per_node)
    if nodes is not None and nodes < needed:
        raise ConfigError(f"{world_size} ranks need {needed} nodes of {devices_per_node}, --nodes is {nodes}")
    return Job(stage, config, arch, shape_from, layout, switches, device, nodes or needed, min(devices_per_node, world_size))


def _section(stage: Stage, config: Config) -> Any:
    return {
        "pretrain": config.pretrain, "sft": config.sft, "reward-model": config.reward_model, "grpo": config.grpo,
        "rejection": config.curation.rejection,
    }.get(stage)  # fmt: skip


def _moe(stage: Stage, config: Config) -> MoeTrainingConfig:
    return _section(stage, config).moe if stage in _TRAINED else MoeTrainingConfig()
