"""What a training command would do on a cluster: its checks, layout, batches, engines and time-outs, from the settings alone.

Every number comes from the function that the run itself uses. Nothing is started; weights, data and devices are not needed.
"""

from __future__ import annotations

import warnings

from megatron_r1.config.schema import Config
from megatron_r1.conversion.model_shape import FOR_WANT, shape_of_model
from megatron_r1.errors import ConfigError
from megatron_r1.mcore import host
from megatron_r1.mcore.layout import smallest_layout
from megatron_r1.mcore.switch_rules import SwitchContext, planned_machine
from megatron_r1.mcore.switches import resolve_switches
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.dry_run.cluster import Cluster, place_engines, place_ranks
from megatron_r1.pipeline.dry_run.describe import (
    describe_engines,
    describe_layout,
    describe_limits,
    describe_model,
    describe_unchecked,
    table_of_ranks,
)
from megatron_r1.pipeline.dry_run.found import DryRun, Engines, Found
from megatron_r1.pipeline.dry_run.room import describe_room
from megatron_r1.pipeline.dry_run.stages import PLANNED
from megatron_r1.rollout.options import engine_options
from megatron_r1.runtime.device import resolve_device
from megatron_r1.runtime.files import written_atomically


def plan_training(command: str, config: Config, job: DryRun) -> str:
    """A table of what `megatron-r1 <command>` would do.

    Raises:
        ConfigError: one line, if something does not fit; nothing is written then.
        CheckpointError: `model.weights` is here and cannot be read.
        DataError: the table cannot be written, or a source of a blend that is here cannot be trained on.
    """
    PLANNED[command].check(config)
    arch, shape_from = shape_of_model(config.model)
    try:
        found = _resolve_job(command, config, job, arch, shape_from)
        rows = [
            *describe_model(found),
            *describe_layout(found),
            *PLANNED[command].batches(found),
            *describe_engines(found),
            *describe_room(command, found),
            *describe_limits(found),
            *describe_unchecked(config),
        ]
    except ConfigError as error:
        if FOR_WANT not in shape_from:
            raise
        raise ConfigError(f"{error} (the shape is that of {shape_from})") from None
    if job.table is not None:
        with written_atomically(job.table) as file:
            file.writelines(f"{line}\n" for line in table_of_ranks(found))
    cluster = found.cluster
    size = f"{cluster.world_size} rank(s) on {cluster.nodes} node(s) of {min(cluster.per_node, cluster.world_size)}"
    head = f"dry run of {command}: {size}, device {found.device}; nothing is started"
    return "\n".join([head, *(f"{label:<12}{text}" for label, text in rows)])


def _resolve_job(command: str, config: Config, job: DryRun, arch: Architecture, shape_from: str) -> Found:
    stage = PLANNED[command]
    device = config.runtime.device
    kind = resolve_device("auto").kind if device == "auto" else device
    warnings.filterwarnings("ignore", module=r"megatron\.core\b.*")  # of optional packages, see `open_session`
    host.activate("cpu")
    from megatron_r1.mcore.rank_groups import rank_groups
    from megatron_r1.mcore.transformer_config import transformer_config

    arch = stage.shape(config, arch)
    world_size = job.world_size or smallest_layout(config.parallel, arch, config.megatron.pipeline_model_parallel_layout).world_size
    layout = stage.layout(config, arch, world_size)
    moe = stage.moe(config)
    work = SwitchContext(arch, layout, config.runtime, moe, stage.packed(config))
    switches = resolve_switches(config.megatron, work, planned_machine(kind, config.megatron.fp8_recipe))
    transformer_config(arch, layout, config.runtime, moe)  # what Megatron-Core refuses ends a dry run, too
    cluster, groups = Cluster(world_size, job.gpus_per_node), rank_groups(layout)
    engines, opened = None, stage.samples(config) or (config if job.is_measured else None)
    if opened is not None:
        options = engine_options(
            arch,
            opened.rollout,
            device=kind,
            dtype="bfloat16" if config.runtime.dtype == "bf16" else "float32",
            bos_token_id=0,  # without a tokenizer; no check looks at them
            eos_token_id=0,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
        engines = Engines(options, place_engines(cluster, opened.rollout, kind))
    ranks = place_ranks(cluster, layout, groups, arch.num_hidden_layers)
    return Found(config, job, cluster, kind, arch, shape_from, layout, groups, ranks, engines, switches.on)
