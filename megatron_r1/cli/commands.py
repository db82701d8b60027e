"""The commands of `megatron-r1`: what each is, what it reads, and what runs it.

torch and the rest are imported when a command runs, not here: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_r1.config.help import explain, list_sections
from megatron_r1.config.keys import is_within
from megatron_r1.config.load import load_config
from megatron_r1.config.resume import COMMON, READ_BY
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError
from megatron_r1.runtime.file_locks import use_locks

#: sections that several stages read; of these `--help` shows the settings below alone
SHARED = {*COMMON, "rollout", "reward", "evaluate", "checkpoint"}
EVERYBODY_SETS = (
    "run_dir", "seed", "model.preset", "model.weights", "data.source", "data.template", "runtime.device", "checkpoint.interval",
)  # fmt: skip
CURATION = tuple(
    f"curation.{name}" for name in ("inputs", "form", "special_token", "workers", "filters", "dedup", "decontamination", "mix")
)


@dataclass(frozen=True)
class Command:
    """A command that takes a config: which function runs it, and what it reads. A new training stage is one more of `COMMANDS`."""

    target: str  #: "module:function", imported when the command runs
    summary: str
    sections: tuple[str, ...]  #: sections, and single settings, that the command reads
    is_stage: bool = False  #: the function takes a session, too, and runs on every rank
    has_dry_run: bool = False  #: whether `pipeline.dry_run` knows it
    own: tuple[str, ...] = ()  #: the sections that `--help` shows; empty: those of `sections` that are not `SHARED`

    @property
    def shown(self) -> tuple[str, ...]:
        """What `--help` shows: the command's own settings first, then those that everybody sets."""
        own = self.own or tuple(section for section in self.sections if section not in SHARED)
        return own + tuple(key for key in EVERYBODY_SETS if is_within(key, self.sections) and not is_within(key, own))


COMMANDS = {
    "pretrain": Command(
        "megatron_r1.pipeline.stages.pretrain:run_pretrain",
        "train a base model on next tokens",
        READ_BY["pretrain"],
        is_stage=True,
        has_dry_run=True,
    ),
    "sft": Command(
        "megatron_r1.pipeline.stages.sft:run_sft",
        "fine-tune on conversations",
        READ_BY["sft"],
        is_stage=True,
        has_dry_run=True,
    ),
    "reward-model": Command(
        "megatron_r1.pipeline.stages.reward_model:run_reward_model",
        "train a reward model on preferences or on safety labels",
        READ_BY["reward-model"],
        is_stage=True,
        has_dry_run=True,
    ),
    "grpo": Command(
        "megatron_r1.pipeline.stages.grpo:run_grpo",
        "reinforcement learning with rule rewards",
        READ_BY["grpo"],
        is_stage=True,
        has_dry_run=True,
    ),
    "build-index": Command(
        "megatron_r1.pipeline.commands:run_build_index",
        "make the indices of data.blend ahead of pretraining",
        (*COMMON, "pretrain"),
        own=("data.blend", "data.split", "data.index_cache", "data.tokenizer", "pretrain"),
    ),
    "curate": Command(
        "megatron_r1.pipeline.commands:run_curate_command",
        "filter, deduplicate, decontaminate and mix files of conversations",
        ("run_dir", "seed", *CURATION),
    ),
}
EVALUATE = Command(
    "megatron_r1.pipeline.commands:run_evaluate_command",
    "measure a model on benchmarks, or on held-out problems",
    (*COMMON, "rollout", "reward", "evaluate"),
    own=("evaluate",),
)
RESCORE = replace(EVALUATE, target="megatron_r1.pipeline.commands:run_rescore_command")
PIPELINES = {
    "r1-zero": Command(
        "megatron_r1.pipeline.recipe.r1_zero:run_r1_zero",
        "base model, R1-Zero from it, and a table that compares them",
        (*COMMON, "pretrain", "grpo", "rollout", "reward", "evaluate", "checkpoint"),
        is_stage=True,
    ),
}
RECIPES = {
    "r1": Command(
        "megatron_r1.pipeline.commands:run_recipe_command",
        "the whole recipe: base, R1-Zero, cold start, reasoning RL, reward models, curated SFT, RL over all scenarios, students",
        tuple(Config.model_fields),
        own=("recipe",),
    ),
    "distill": Command(
        "megatron_r1.pipeline.commands:run_recipe_command",
        "the students alone: distillation of stage 3's curated set, and RL for comparison",
        tuple(Config.model_fields),
        own=("recipe", "sft"),
    ),
}
SCORE_SECTIONS = ("reward", "data.template", "data.template_arguments", "data.tokenizer", "data.system_prompt")
CHECK_SECTIONS = ("data", "reward")


def readers() -> dict[str, tuple[str, ...]]:
    """Name of every command that takes settings -> the sections and settings that the command reads."""
    pipelines = {f"pipeline {name}": command for name, command in (PIPELINES | RECIPES).items()}
    commands = COMMANDS | {"evaluate": EVALUATE} | pipelines
    return {name: command.sections for name, command in commands.items()} | {
        "score": SCORE_SECTIONS,
        "check-problems": CHECK_SECTIONS,
    }


def handle_training(arguments: argparse.Namespace) -> int:
    """Run a training command, or say what it would do."""
    _refuse_without_dry_run(arguments, "world_size", "gpus_per_node", "gpu", "mean_tokens", "table")
    if not arguments.dry_run:
        return run_command(arguments.command, arguments.config, arguments.overrides)
    config = load_config(arguments.config, arguments.overrides)
    from megatron_r1.pipeline.dry_run.found import DryRun
    from megatron_r1.pipeline.dry_run.plan import plan_training

    per_node = arguments.gpus_per_node or DryRun.gpus_per_node
    job = DryRun(arguments.world_size, per_node, arguments.mean_tokens, arguments.table, arguments.gpu)
    print(plan_training(arguments.name, config, job))
    return 0


def _refuse_without_dry_run(arguments: argparse.Namespace, *options: str) -> None:
    for option in options:
        if not arguments.dry_run and getattr(arguments, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} says what a dry run is to look at: add --dry-run, or leave it out")


def run_command(command: Command, path: Path | None, overrides: Sequence[str]) -> int:
    """Load the settings and run a command with them."""
    config = load_config(path, overrides)
    use_locks(config.runtime.file_locks)
    module, _, function = command.target.partition(":")
    run = getattr(importlib.import_module(module), function)
    if command.is_stage:
        from megatron_r1.pipeline.session import open_session

        with open_session(config.runtime) as session:
            run(config, session)
    else:
        run(config)
    return 0


def handle_doctor(arguments: argparse.Namespace) -> int:
    """Say what this machine has. The exit code is 1 if the chosen device lacks something, 2 if something that is there fails."""
    from megatron_r1.rewards.sandbox.probe import describe_sandbox
    from megatron_r1.runtime.doctor import DeviceCheck, run_doctor

    def checks_of_a_gpu() -> list[DeviceCheck]:
        from megatron_r1.mcore.device_checks import device_checks
        from megatron_r1.rollout.vllm.runner import runner_check

        return [*device_checks("cuda"), runner_check()]

    def switches_of(device: str) -> list[tuple[str, str]]:
        from megatron_r1.mcore.active import transformer_engine_problem
        from megatron_r1.mcore.switch_rules import Machine, find_machine
        from megatron_r1.mcore.switches import describe_defaults
        from megatron_r1.runtime.device import compute_capability
        from megatron_r1.runtime.doctor import installed_version

        if device == "cpu":
            return describe_defaults(Machine("cpu"))
        has_engine = installed_version("transformer-engine") is not None and transformer_engine_problem() is None
        return describe_defaults(find_machine("cuda", has_engine, compute_capability()))

    return run_doctor(arguments.device, describe_sandbox, checks_of_a_gpu, switches_of)


def handle_evaluate(arguments: argparse.Namespace) -> int:
    """Measure a model, score kept responses again, or print tables."""
    if arguments.table is None:
        return run_command(RESCORE if arguments.rescore else EVALUATE, arguments.config, arguments.overrides)
    from megatron_r1.pipeline.commands import print_result_tables

    print_result_tables(arguments.table)
    return 0


def handle_score(arguments: argparse.Namespace) -> int:
    """Score the responses of a file and print the counts."""
    workers = [] if arguments.workers is None else [f"reward.workers={arguments.workers}"]
    config = load_config(arguments.config, [*arguments.overrides, *workers])
    from megatron_r1.pipeline.score import score_file

    counts = score_file(config, arguments.reward, arguments.input, arguments.output, arguments.mark_unscorable)
    print(f"{arguments.output}: " + ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()))
    return 0


def handle_check_problems(arguments: argparse.Namespace) -> int:
    """Print what is wrong with a file of problems. The exit code is 1 if anything is."""
    workers = [] if arguments.workers is None else [f"reward.workers={arguments.workers}"]
    source = json.dumps(str(arguments.file))
    config = load_config(arguments.config, [*arguments.overrides, *workers, f"data.source={source}"])
    from megatron_r1.pipeline.check_problems import check_problems, render_report

    report = check_problems(config, arguments.json, not arguments.no_solutions)
    print(render_report(report, str(arguments.file)))
    return 1 if report.counts else 0


def handle_recipe(arguments: argparse.Namespace) -> int:
    """Run stages of the R1 recipe, or print what they would do."""
    config = load_config(arguments.config, arguments.overrides)
    use_locks(config.runtime.file_locks)
    first, last = arguments.first, arguments.last
    _refuse_without_dry_run(arguments, "world_size", "gpus_per_node", "gpu")
    if arguments.dry_run:
        from megatron_r1.pipeline.dry_run.found import DryRun
        from megatron_r1.pipeline.recipe.plan import describe_plan

        job = DryRun(arguments.world_size, arguments.gpus_per_node or DryRun.gpus_per_node, gpu=arguments.gpu)
        print(describe_plan(config, first, last, job if arguments.world_size else None))
    else:
        from megatron_r1.pipeline.commands import run_recipe_command

        run_recipe_command(config, first, last)
    return 0


def handle_config(arguments: argparse.Namespace) -> int:
    """Explain settings and sections, or list all sections."""
    print("\n\n".join(explain(key, readers()) for key in arguments.keys) or list_sections())
    return 0


def handle_report(arguments: argparse.Namespace) -> int:
    """Write the report of a run folder, and its curves as a picture."""
    from megatron_r1.report.html import write_report
    from megatron_r1.report.plots import write_curves_png
    from megatron_r1.report.rollouts import read_choice

    print(write_report(arguments.run_dir, read_choice(arguments.most_mb, arguments.seed, arguments.steps, arguments.tokenizer)))
    if arguments.curves is not None:
        write_curves_png(arguments.run_dir, arguments.curves)
        print(arguments.curves)
    return 0


def handle_status(arguments: argparse.Namespace) -> int:
    """Print how far a run is."""
    from megatron_r1.report.status import describe_status

    print(describe_status(arguments.run_dir))
    return 0


def handle_show_samples(arguments: argparse.Namespace) -> int:
    """Print what a step of a pretraining run trained on."""
    from megatron_r1.pipeline.commands import show_samples

    show_samples(arguments.run_dir, arguments.step)
    return 0


def handle_preflight(arguments: argparse.Namespace) -> int:
    """Look at every node of a job. The exit code is 3 if a node is bad."""
    from megatron_r1.runtime.preflight import run_preflight

    return run_preflight(arguments.device, arguments.disk, arguments.bad_nodes, arguments.slowest)


def handle_serve_rollouts(arguments: argparse.Namespace) -> int:
    """Hold a rollout engine until the process is ended."""
    from megatron_r1.rollout.channel.server import serve_rollouts
    from megatron_r1.runtime.launch import child_environment, read_launch

    serve_rollouts(arguments.announce, read_launch(), child_environment(), arguments.address)
    return 0
