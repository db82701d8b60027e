"""The rows of a dry run's table that all stages share: model, layout, engines, time-outs, and what was not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_r1.config.schema import Config
from megatron_r1.mcore.layout import group_sizes
from megatron_r1.model.size import count_parameters
from megatron_r1.pipeline.dry_run.cluster import shorten
from megatron_r1.pipeline.dry_run.found import Engines, Found, Rows
from megatron_r1.rollout.cache_size import sequence_bytes
from megatron_r1.rollout.options import engine_weight_bytes
from megatron_r1.runtime.open_files import needed_file_descriptors

_AXES = ("tp", "cp", "ep", "etp", "dp", "expert_dp", "pp")


def describe_model(found: Found) -> Rows:
    """Shape and size of the model."""
    arch = found.arch
    size = f"{count_parameters(arch) / 1e9:,.2f} B parameters, {arch.max_position_embeddings:,} positions"
    return [("model", f"{arch.model_type}: {arch.num_hidden_layers} layers, {size}; shape from {found.shape_from}")]


def describe_layout(found: Found) -> Rows:
    """The axes with the group of rank 0 on each, and the pipeline stages."""
    layout, cluster = found.layout, found.cluster
    sequence = "with" if layout.sequence_parallel else "without"
    rows = [("layout", f"{sequence} sequence parallelism, {layout.vpp} virtual pipeline stage(s) a rank")]
    rows.append(("", f"{'axis':<10} {'ranks':>5}  {'group of rank 0':<22} nodes of a group"))
    for axis in _AXES:
        groups = found.groups[axis]
        most = max(len(cluster.nodes_of(group)) for group in groups)
        rows.append(("", f"{axis.replace('_', ' '):<10} {len(groups[0]):>5}  {shorten(groups[0]):<22} {most}"))
    rows.append(("stages", f"{'stage':<6} {'ranks':<22} {'nodes':<12} layers"))
    for stage in range(layout.pp):
        ranks = [place.rank for place in found.ranks if place.positions["pp"] == stage]
        layers = " and ".join(shorten(part) for part in found.ranks[ranks[0]].layers)
        ends = [" + embedding"] * (stage == 0) + [" + head"] * (stage == layout.pp - 1)
        nodes = shorten(cluster.nodes_of(ranks))
        rows.append(("", f"{stage:<6} {shorten(ranks):<22} {nodes:<12} {layers}{''.join(ends)}"))
    rows.append(("switches", ", ".join(found.switches) or "none of section megatron is on"))
    return rows


def describe_engines(found: Found) -> Rows:
    """Places of the engines, and what they are started with."""
    if found.engines is None:
        return []
    rollout, options = found.config.rollout, found.engines.options
    over = f" on {options.nodes} nodes" if options.nodes > 1 else ""
    each = f"{options.tensor_parallel_size} device(s){over}" if found.device == "cuda" else f"a process{over}"
    rows = [("engines", f"{_where(found.engines, rollout.servers)}; each {each}, weights sent by {options.transfer}")]
    prompt, longest = found.config.data.max_prompt_tokens, options.max_model_len
    rows.append(("context", f"prompt {prompt:,} + response {longest - prompt:,} = {longest:,} tokens"))
    cache = "what is left"
    if options.kv_cache_bytes is not None:
        cache = f"{options.kv_cache_bytes / 1e9:,.2f} GB"
    elif options.device == "cpu":
        needed = options.max_num_seqs * sequence_bytes(found.arch, options.dtype, longest, options.tensor_parallel_size)
        cache = f"{needed / 1e9:,.2f} GB, or less where {options.gpu_memory_utilization:g} of the free memory is less"
    share = f"{options.gpu_memory_utilization:g} of a device, " if found.device == "cuda" else ""
    held = f"weights {engine_weight_bytes(found.arch, options.dtype) / 1e9:,.2f} GB over its devices, KV cache {cache}"
    rows.append(("memory", f"engine: {share}{held}, {options.max_num_seqs} sequences at a time"))
    return rows


def _where(engines: Engines, servers: str | None) -> str:
    if engines.places is None:
        return f"on the servers announced in {servers}, which were not looked for"
    own = sum(place is not None for place in engines.places)
    parts = "" if own == len(engines.heads) else f", {own} ranks with a part"
    return f"{len(engines.heads)}, beside rank(s) {shorten(engines.heads)}{parts}"


def describe_limits(found: Found) -> Rows:
    """Files that a rank opens, and after how long the run takes something for lost."""
    runtime = found.config.runtime
    files = needed_file_descriptors(found.layout.world_size, group_sizes(found.layout))
    silent, idle = runtime.heartbeat.lost_seconds, runtime.heartbeat.stall_seconds
    ranks = f"collective {_seconds(runtime.collective_timeout_seconds)}; rank: silent {_seconds(silent)}, idle {_seconds(idle)}"
    rows = [("open files", f"{files:,} of a rank"), ("time-outs", ranks)]
    if found.engines is None:
        return rows
    options = found.engines.options
    start, call = _seconds(options.start_timeout_seconds), _seconds(options.step_timeout_seconds)
    return [*rows, ("", f"engine: start {start}, call {call}, silent {_seconds(options.stall_seconds)}")]


def _seconds(value: float | None) -> str:
    return "no limit" if value is None else f"{value:,.0f} s"


def describe_unchecked(config: Config) -> Rows:
    """What the real run looks at and a dry run does not."""
    unchecked = ["data", "tokenizer"]
    weights = config.model.weights
    if weights is None:
        unchecked.append("weights (model.weights is not set: a run would start from random ones)")
    elif not Path(weights).exists():
        unchecked.append(f"weights (model.weights={weights} is not here)")
    else:
        unchecked.append("values of the weights")
    return [("not checked", "; ".join(unchecked))]


def table_of_ranks(found: Found) -> Iterator[str]:
    """A heading, and a line for every rank: its node, its position on every axis, its layers, its engine."""
    yield "\t".join(["rank", "node", "local_rank", *_AXES, "layers", "engine"])
    for place in found.ranks:
        local = found.cluster.launch(place.rank).local_rank
        layers = " ".join(shorten(part) for part in place.layers)
        engine = found.engines.of_rank(place.rank) if found.engines else ""
        positions = [place.positions[axis] for axis in _AXES]
        yield "\t".join(map(str, [place.rank, place.node, local, *positions, layers, engine]))
