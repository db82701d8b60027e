"""`megatron-r1 plan`: what a stage takes, before it is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError
from megatron_r1.plan.simulate_arguments import add_simulate

if TYPE_CHECKING:
    from megatron_r1.config.schema import Config
    from megatron_r1.plan.job import Job
    from megatron_r1.plan.memory import MemoryPlan
    from megatron_r1.plan.stage_time import Assumed, TimePlan

SIMULATE = "plan simulate"  #: the name of a command
MOST_NODES = 100_000
_STAGES = ("pretrain", "sft", "reward-model", "grpo", "rejection", "convert")  # plan.job's, which imports torch


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Add the commands plan and plan simulate."""
    plan = commands.add_parser(
        "plan",
        help="what a stage takes of devices and nodes, before it is started",
        description="Works out the memory of every phase of a stage, of the device and of the node that need most, and its time. "
        "Weights, data and devices need not be here. Exit code 2 if it does not fit.",
    )
    plan.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings; what it leaves out keeps its default")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    plan.add_argument("--stage", choices=_STAGES, default="grpo", help="what is planned (default grpo)")
    plan.add_argument("--gpu", metavar="NAME", help="A100, H20, H800, H100, H200, B200 or GB200; default: H800; on CPUs none")
    plan.add_argument("--nodes", type=_count, metavar="N", help="default: as few as the layout needs")
    plan.add_argument("--gpus-per-node", type=_count, metavar="N", default=8, help="ranks of a node; default: 8")
    plan.add_argument(
        "--imbalance", type=_factor, metavar="F", help="tokens of the rank whose experts are used most, over the mean; default: 1.3"
    )
    plan.add_argument(
        "--response-tokens",
        type=_count,
        metavar="N",
        help="tokens of a response, or of a sample, in the mean; default: a quarter of their limit, or 5,355 of a sample",
    )
    plan.add_argument("--prompt-tokens", type=_count, metavar="N", default=160, help="tokens of a prompt in the mean; default: 160")
    plan.add_argument(
        "--engine-nodes", type=_count, metavar="N", help="nodes of rollout.placement=disaggregated; default: as many as --nodes"
    )
    plan.add_argument(
        "--after-updates", type=_count, metavar="N", help="policy updates before the round, for grpo.length_schedule; default: none"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="instead, layouts and engines on --nodes: those that fit by time, why others do not, and the fastest as YAML",
    )
    plan.add_argument("--price", type=_price, metavar="DOLLARS", default=2.0, help="of a GPU-hour; default: 2")
    plan.add_argument("--json", type=Path, metavar="FILE.json", help="also write the plan there, in bytes")
    plan.add_argument(
        "--page", type=Path, metavar="FILE.html", help="also as a page: memory of every pipeline stage and phase, time line, cost"
    )
    plan.add_argument(
        "--compare", type=Path, metavar="RUN_DIR", help="instead, what a finished run's metrics show beside what is planned for it"
    )
    plan.set_defaults(handler=handle_plan)
    add_simulate(commands.add_parser(SIMULATE, help="play rounds of GRPO: idle engines, stale samples, the longest answers"))


def handle_plan(arguments: argparse.Namespace) -> int:
    """Print the plan. The exit code is 2 if it does not fit."""
    if arguments.compare is not None:
        return _compare_with_run(arguments)
    config = load_config(arguments.config, arguments.overrides)
    from megatron_r1.plan.job import read_job
    from megatron_r1.plan.memory import IMBALANCE, plan_memory
    from megatron_r1.plan.stage_time import Assumed, plan_time
    from megatron_r1.plan.table import describe_job, describe_memory, memory_rows
    from megatron_r1.plan.time_table import describe_time, time_record
    from megatron_r1.runtime.files import write_atomically

    assumed = Assumed(
        arguments.response_tokens, arguments.prompt_tokens, engine_nodes=arguments.engine_nodes,
        updates_done=arguments.after_updates or 0,
    )  # fmt: skip
    if arguments.search:
        return _search(arguments, config, assumed)
    job = read_job(config, arguments.stage, arguments.gpu, arguments.nodes, devices_per_node=arguments.gpus_per_node)
    if job.device is None:
        return _plan_on_cpus(arguments, job)
    plan = plan_memory(job, arguments.imbalance or IMBALANCE)
    print(describe_job(job))
    print(describe_memory(job, plan))
    problems = plan.shortfalls()
    time = None if problems else plan_time(job, assumed)
    if time is not None:
        print(describe_time(time, arguments.price))
    if arguments.json is not None:
        found = {"stage": job.stage, "device": job.device_name, "ranks": job.world_size, "nodes": job.nodes}
        found |= {"fits": not problems, "memory": memory_rows(plan), "time": None if time is None else time_record(time)}
        write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")
    if arguments.page is not None:
        _write_page(arguments, job, plan, time)
    if problems:
        raise ConfigError(f"{arguments.stage} does not fit: {problems[0]}")
    return 0


def _plan_on_cpus(arguments: argparse.Namespace, job: Job) -> int:
    """Print what the processes take of a machine. Times and pages are of devices."""
    from megatron_r1.plan.cpu_table import describe_cpu_memory
    from megatron_r1.plan.memory_cpu import plan_cpu_memory
    from megatron_r1.plan.table import describe_job, memory_rows
    from megatron_r1.runtime.files import write_atomically

    if arguments.page is not None:
        raise ConfigError("--page is of devices, and runtime.device=cpu has none: give --gpu NAME, or leave --page out")
    plan = plan_cpu_memory(job)
    print(describe_job(job))
    print(describe_cpu_memory(plan))
    problems = plan.shortfalls()
    if arguments.json is not None:
        found = {"stage": job.stage, "device": job.device_name, "ranks": job.world_size, "nodes": job.nodes}
        found |= {"fits": not problems, "memory": memory_rows(plan), "time": None}
        write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")
    if problems:
        raise ConfigError(f"{arguments.stage} does not fit: {problems[0]}")
    return 0


def _write_page(arguments: argparse.Namespace, job: Job, plan: MemoryPlan, time: TimePlan | None) -> None:
    from megatron_r1.plan.memory import IMBALANCE, stage_phases
    from megatron_r1.plan.table import describe_job
    from megatron_r1.report.plan_page import PlanPage, write_plan_page

    if not arguments.page.parent.is_dir():
        raise ConfigError(f"--page {arguments.page}: there is no folder {arguments.page.parent}")
    stages = [stage_phases(job, stage, plan.engine, arguments.imbalance or IMBALANCE) for stage in range(job.layout.pp)]
    write_plan_page(
        arguments.page,
        PlanPage(
            f"plan of {job.stage}", describe_job(job), stages, plan.device_bytes, plan.node_bytes, plan.shortfalls(), time,
            arguments.price,
        ),
    )  # fmt: skip


def _compare_with_run(arguments: argparse.Namespace) -> int:
    """Print a run beside its plan."""
    if arguments.config is not None or arguments.overrides:
        raise ConfigError("--compare RUN_DIR takes the settings of the run: leave --config and settings out")
    from megatron_r1.plan.compare import compare_run, describe_comparison
    from megatron_r1.plan.table import describe_job

    found = compare_run(arguments.compare, arguments.gpu, prompt=arguments.prompt_tokens)
    print(describe_job(found.job))
    print(describe_comparison(found))
    return 0


def _search(arguments: argparse.Namespace, config: Config, assumed: Assumed) -> int:
    """Print what fits. The exit code is 2 if nothing does."""
    from megatron_r1.plan.memory import IMBALANCE
    from megatron_r1.plan.search import SearchSetting, describe_search, search

    if arguments.nodes is None:
        raise ConfigError("--search needs --nodes N, the size of the job")
    asked = SearchSetting(
        config, arguments.stage, arguments.gpu, arguments.nodes, arguments.gpus_per_node, assumed, arguments.imbalance or IMBALANCE
    )
    found = search(asked)
    print(describe_search(found))
    if not any(one.fits for one in found):
        raise ConfigError(f"{arguments.stage}: nothing fits {arguments.nodes} node(s); the reasons are above")
    return 0


def _number_above(least: float, kind: Callable[[str], float], what: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = -1
        if not least <= number <= MOST_NODES:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} from {least:g} to {MOST_NODES:,}")
        return number

    return read


_count = _number_above(1, int, "whole number")
_factor = _number_above(1, float, "number")
_price = _number_above(0, float, "price")
