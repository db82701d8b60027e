"""Layouts and engines of a stage that fit the devices, ranked by time; and why the others do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import yaml

from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError
from megatron_r1.plan.devices import CPU
from megatron_r1.plan.job import Job, Stage, read_job
from megatron_r1.plan.memory import IMBALANCE, MemoryPlan, plan_memory
from megatron_r1.plan.stage_time import NOTHING_SAID, Assumed, grid_of, plan_time
from megatron_r1.plan.update_time import own_parameters
from megatron_r1.plan.work import model_work

Settings = dict[str, int | float | None]  #: dotted key -> value

_BEST = 3  # layouts that engines are tried with
_SAMPLING = ("sampling", "weight sync")  # phases that an engine beside the trainer decides
_UTILIZATIONS, _SEQUENCES = (0.4, 0.6, 0.8), (256, 1024)
_VIRTUAL = (1, 2, 4)
_SHOWN, _EXAMPLES = 20, 5
_GRADIENT = 4  # bytes


@dataclass(frozen=True)
class LayoutChoice:
    """One choice of settings."""

    settings: Settings
    seconds: float  #: of a round or an update; 0: it is refused
    device_bytes: float  #: at the fullest moment; 0: it is refused
    reason: str = ""  #: why it does not fit; "": it does
    trainer_fits: bool = False  #: whether only the engine is in the way, if something is
    refused: bool = False  #: whether it is out before its memory is counted phase by phase

    @property
    def fits(self) -> bool:
        """Whether it can be run."""
        return not self.reason


@dataclass(frozen=True)
class SearchSetting:
    """What is searched for."""

    config: Config
    stage: Stage
    gpu: str | None
    nodes: int
    per_node: int
    assumed: Assumed = NOTHING_SAID
    imbalance: float = IMBALANCE


def search(asked: SearchSetting) -> list[LayoutChoice]:
    """Every candidate that was looked at, those that fit first, the fastest first of them.

    The trainer's layout is chosen first, with the engine that the config has; then engines for the best layouts.
    """
    if asked.gpu == CPU or (asked.gpu is None and asked.config.runtime.device == "cpu"):
        raise ConfigError("--search: runtime.device=cpu has no device to plan for: give --gpu NAME")
    if asked.stage == "convert":
        raise ConfigError("--search: a conversion has no layout to choose by time")
    # The config's own layout need not fit so many ranks; this one does.
    plain = _with(asked.config, _layout(asked.config, 1, 1, 1, 1))
    job = read_job(plain, asked.stage, asked.gpu, asked.nodes, devices_per_node=asked.per_node)
    found = [_judge(asked, settings) for settings in _layouts(asked.config, job)]
    if asked.stage == "grpo" and asked.config.rollout.placement != "single":
        able = sorted((one for one in found if one.trainer_fits), key=lambda one: one.seconds)
        for one, engine in itertools.product(able[:_BEST], _engine_choices(asked)):
            found.append(_judge(asked, one.settings | engine))
    return sorted(found, key=lambda one: (not one.fits, one.refused, one.seconds))


def pareto(found: Iterable[LayoutChoice]) -> list[LayoutChoice]:
    """Of those that fit, those that nothing beats in time and in memory; the fastest first."""
    best, kept = float("inf"), []
    for one in sorted((one for one in found if one.fits), key=lambda one: (one.seconds, one.device_bytes)):
        if one.device_bytes < best:
            best = one.device_bytes
            kept.append(one)
    return kept


def as_yaml(settings: Settings) -> str:
    """Settings as a part of a config file."""
    nested: dict[str, dict[str, int | float | None]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return yaml.safe_dump(nested, sort_keys=False)


def describe_search(found: list[LayoutChoice]) -> str:
    """A table of those that fit, reasons of those that do not, and the fastest as YAML."""
    fitting, beyond = [one for one in found if one.fits], [one for one in found if not one.fits and not one.refused]
    refused = len(found) - len(fitting) - len(beyond)
    front = pareto(found)
    lines = [f"\n{len(fitting)} of {len(found)} choices fit; * nothing else is faster and smaller", "    seconds       GB"]
    lines += [
        f"{'*' if one in front else ' '} {one.seconds:9,.1f} {one.device_bytes / 1e9:8,.1f}  {_in_words(one.settings)}"
        for one in fitting[:_SHOWN] + [one for one in front if one not in fitting[:_SHOWN]]
    ]
    if beyond:
        lines.append(f"\n{len(beyond)} do not fit, the fastest of them:")
        lines += [f"  {one.seconds:9,.1f}  {_in_words(one.settings)}: {one.reason}" for one in beyond[:_SHOWN]]
    if refused:
        lines.append(f"\n{refused} do not divide the model or the ranks, or hold too many weights, as:")
        reasons = {one.reason: one for one in found if one.refused}
        lines += [f"  {_in_words(one.settings)}: {one.reason}" for one in list(reasons.values())[:_EXAMPLES]]
    if fitting:
        lines += ["\nfastest:", as_yaml(fitting[0].settings).rstrip()]
    return "\n".join(lines)


def _in_words(settings: Settings) -> str:
    return " ".join(f"{key.partition('.')[2]}={value:g}" for key, value in settings.items() if value is not None)


def _judge(asked: SearchSetting, settings: Settings) -> LayoutChoice:
    try:
        job = read_job(_with(asked.config, settings), asked.stage, asked.gpu, asked.nodes, devices_per_node=asked.per_node)
        _check_weights(job)
        memory = plan_memory(job, asked.imbalance)
        if memory.engine is not None and memory.engine.sequences < 1:
            return LayoutChoice(settings, 0.0, 0.0, memory.shortfalls()[0], refused=True)
        time = plan_time(job, asked.assumed)
    except ConfigError as error:
        return LayoutChoice(settings, 0.0, 0.0, str(error), refused=True)
    assert time is not None  # only a conversion has none
    problems = memory.shortfalls()
    return LayoutChoice(settings, time.seconds, memory.peak.device_bytes, "".join(problems[:1]), _trainer_fits(memory))


def _check_weights(job: Job) -> None:
    """Raises ConfigError for a layout whose weights and gradients alone do not fit: most of those that can be tried."""
    assert job.device is not None  # `plan_time` has refused a CPU
    held = own_parameters(model_work(job.arch), grid_of(job.layout)) * (job.width + _GRADIENT if job.is_trained else job.width)
    if held > job.device.memory_bytes:
        raise ConfigError(f"weights and gradients of a rank alone are {held / 1e9:,.0f} GB of {job.device.memory_bytes / 1e9:,.1f}")


def _trainer_fits(memory: MemoryPlan) -> bool:
    of_trainer = [phase for phase in memory.phases if phase.name not in _SAMPLING]
    fits = all(phase.device_bytes <= memory.device_bytes for phase in of_trainer)
    return fits and memory.host_peak.host_bytes <= memory.node_bytes


def _with(config: Config, settings: Settings) -> Config:
    """The config with these settings, unchecked as `read_job` checks them."""
    sections: dict[str, dict[str, int | float | None]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = {section: getattr(config, section).model_copy(update=values) for section, values in sections.items()}
    return config.model_copy(update=changed)


def _layouts(config: Config, job: Job) -> Iterator[Settings]:
    """Powers of two; tensor parallelism inside a node."""
    experts = job.arch.experts.count if job.arch.experts else 1
    for tp in _powers(min(job.devices_per_node, job.world_size)):
        for pp in _powers(min(job.world_size // tp, job.arch.num_hidden_layers)):
            for ep in _powers(min(job.world_size // pp, experts)):
                for vpp in _VIRTUAL if pp > 1 else (1,):
                    yield _layout(config, tp, pp, vpp, ep)


def _layout(config: Config, tp: int, pp: int, vpp: int, ep: int) -> Settings:
    """Without stages that are named one by one, which are those of another layout."""
    named = config.megatron.pipeline_model_parallel_layout
    other: Settings = {} if named is None else {"megatron.pipeline_model_parallel_layout": None}
    return {"parallel.tp": tp, "parallel.pp": pp, "parallel.vpp": vpp, "parallel.ep": ep} | other


def _engine_choices(asked: SearchSetting) -> Iterator[Settings]:
    """Engines beside the trainer or on nodes of their own: their size, their share of a device, and sequences of a step."""
    for size in _powers(asked.nodes * asked.per_node):
        nodes = -(-size // asked.per_node)
        if asked.nodes % nodes:
            continue
        for share, sequences in itertools.product(_UTILIZATIONS, _SEQUENCES):
            yield {
                "rollout.tensor_parallel_size": size, "rollout.nodes_per_engine": nodes,
                "rollout.engines_per_node": 1 if nodes > 1 else asked.per_node // size,
                "rollout.gpu_memory_utilization": share, "rollout.max_num_seqs": sequences,
            }  # fmt: skip


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(max(most, 1).bit_length())]
