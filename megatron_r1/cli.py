"""The `megatron-r1` command: reads arguments, runs one command, turns errors into one line and an exit code.

torch and the rest are imported by the command that runs, not here: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, get_args

from pydantic.fields import FieldInfo

from megatron_r1.config.load import flatten_config, known_keys, load_config
from megatron_r1.config.schema import Config
from megatron_r1.conversion.arguments import add_convert
from megatron_r1.errors import R1Error, StopRequested
from megatron_r1.runtime.job import record_error, record_outcome
from megatron_r1.runtime.launch import launched_rank

INTERRUPTED = 130
COMMON = ("run_dir", "seed", "model", "parallel", "runtime", "data")
CURATION = tuple(
    f"curation.{name}" for name in ("inputs", "form", "special_token", "workers", "filters", "dedup", "decontamination", "mix")
)


@dataclass(frozen=True)
class Command:
    """A command that takes a config: which function runs it, and what it reads. A new training stage is one more of `COMMANDS`."""

    target: str  #: "module:function", imported when the command runs
    summary: str
    sections: tuple[str, ...]  #: and settings by themselves
    is_stage: bool = False  #: the function takes a session, too, and runs on every rank


COMMANDS = {
    "pretrain": Command(
        "megatron_r1.pipeline.stages.pretrain:run_pretrain",
        "train a base model on next tokens",
        (*COMMON, "pretrain", "evaluate", "checkpoint"),
        is_stage=True,
    ),
    "sft": Command(
        "megatron_r1.pipeline.stages.sft:run_sft",
        "fine-tune on conversations",
        (*COMMON, "sft", "checkpoint"),
        is_stage=True,
    ),
    "reward-model": Command(
        "megatron_r1.pipeline.stages.reward_model:run_reward_model",
        "train a reward model on preferences or on safety labels",
        (*COMMON, "reward_model", "checkpoint"),
        is_stage=True,
    ),
    "grpo": Command(
        "megatron_r1.pipeline.stages.grpo:run_grpo",
        "reinforcement learning with rule rewards",
        (*COMMON, "grpo", "rollout", "reward", "evaluate", "checkpoint"),
        is_stage=True,
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
)
RESCORE = replace(EVALUATE, target="megatron_r1.pipeline.commands:run_rescore_command")
PIPELINES = {
    "r1-zero": Command(
        "megatron_r1.pipeline.r1_zero:run_r1_zero",
        "base model, R1-Zero from it, and a table that compares them",
        tuple(Config.model_fields),
        is_stage=True,
    ),
}
RECIPE_SUMMARIES = {
    "r1": "the whole recipe: base, R1-Zero, cold start, reasoning RL, reward models, curated SFT, RL over all scenarios, students",
    "distill": "the students alone: distillation of stage 3's curated set, and RL for comparison",
}


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are told on one line, as every other error is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megatron-r1: error: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, that of the R1Error, or 130 when interrupted."""
    parser = _build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unknown argument {rest[0]}")
    try:
        if hasattr(arguments, "overrides"):
            arguments.overrides += rest
        if hasattr(arguments, "handler"):
            code = arguments.handler(arguments)
        else:
            code = _run_command(arguments.command, arguments.config, arguments.overrides)
    except R1Error as error:
        record_error(error)
        return _end(str(error) if isinstance(error, StopRequested) else f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        record_outcome("failed", "interrupted")
        return _end("interrupted; the same command resumes", INTERRUPTED)
    record_outcome("failed" if code else "finished")
    return code


def _run_command(command: Command, path: Path | None, overrides: Sequence[str]) -> int:
    config = load_config(path, overrides)
    module, _, function = command.target.partition(":")
    run = getattr(importlib.import_module(module), function)
    if command.is_stage:
        from megatron_r1.pipeline.session import open_session

        with open_session(config.runtime) as session:
            run(config, session)
    else:
        run(config)
    return 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    from megatron_r1.rewards.sandbox.probe import describe_sandbox
    from megatron_r1.runtime.doctor import run_doctor

    return run_doctor(arguments.device, describe_sandbox)


def _run_evaluate(arguments: argparse.Namespace) -> int:
    if arguments.table is None:
        return _run_command(RESCORE if arguments.rescore else EVALUATE, arguments.config, arguments.overrides)
    from megatron_r1.pipeline.commands import print_result_tables

    print_result_tables(arguments.table)
    return 0


def _run_score(arguments: argparse.Namespace) -> int:
    workers = [] if arguments.workers is None else [f"reward.workers={arguments.workers}"]
    config = load_config(arguments.config, [*arguments.overrides, *workers])
    from megatron_r1.pipeline.score import score_file

    counts = score_file(config, arguments.reward, arguments.input, arguments.output, arguments.mark_unscorable)
    print(f"{arguments.output}: " + ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()))
    return 0


def _run_recipe(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    first, last = arguments.first, arguments.last
    if arguments.dry_run:
        from megatron_r1.pipeline.recipe.plan import describe_plan

        print(describe_plan(config, first, last))
    else:
        from megatron_r1.pipeline.commands import run_recipe_command

        run_recipe_command(config, first, last)
    return 0


def _run_report(arguments: argparse.Namespace) -> int:
    from megatron_r1.report.html import write_report
    from megatron_r1.report.plots import write_curves_png

    print(write_report(arguments.run_dir))
    if arguments.curves is not None:
        write_curves_png(arguments.run_dir, arguments.curves)
        print(arguments.curves)
    return 0


def _run_status(arguments: argparse.Namespace) -> int:
    from megatron_r1.report.status import describe_status

    print(describe_status(arguments.run_dir))
    return 0


def _run_preflight(arguments: argparse.Namespace) -> int:
    from megatron_r1.runtime.preflight import run_preflight

    return run_preflight(arguments.device, arguments.disk, arguments.bad_nodes, arguments.slowest)


def _serve_rollouts(arguments: argparse.Namespace) -> int:
    from megatron_r1.rollout.channel.server import serve_rollouts
    from megatron_r1.runtime.launch import child_environment, read_launch

    serve_rollouts(arguments.announce, read_launch(), child_environment(), arguments.address)
    return 0


def _end(line: str, code: int) -> int:
    """Print the last line on one rank of the job, and return the exit code on all."""
    if "megatron_r1.runtime.distributed" in sys.modules:
        from megatron_r1.runtime.distributed import claim_error_line

        speaks = claim_error_line()
    else:  # the command has not got as far as importing torch
        speaks = launched_rank() == 0
    if speaks:
        print(f"megatron-r1: {line}", file=sys.stderr, flush=True)
    return code


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron-r1", description="The DeepSeek-R1 training pipeline on Megatron-Core and vLLM.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        _add_command(commands, name, command)

    evaluate = _add_command(commands, "evaluate", EVALUATE)
    evaluate.add_argument("--rescore", action="store_true", help="judge the kept responses to benchmarks again; nothing is sampled")
    evaluate.add_argument(
        "--table", nargs="+", metavar="[NAME=]RUN",
        help="print the recipe's result tables, published numbers beside what these runs measured, and do nothing else",
    )  # fmt: skip
    evaluate.set_defaults(handler=_run_evaluate)

    doctor = commands.add_parser("doctor", help="what this machine has, and whether the chosen device can run")
    doctor.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="exit with 1 if this one cannot run")
    doctor.set_defaults(handler=_run_doctor)

    score = commands.add_parser(
        "score",
        help="score the responses of a file",
        description="Add score, outcome (correct, wrong, error, timeout, unscorable) and detail to every line of a .jsonl file.",
        epilog=_describe_settings(("reward",)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument(
        "--reward", required=True, metavar="REWARD",
        help="math, code, choice, format, language, the name of a reward in reward.custom, or package.module:function",
    )  # fmt: skip
    score.add_argument(
        "--input", type=Path, required=True, metavar="FILE.jsonl",
        help="lines with 'response' and 'answer' (math, choice), 'tests' (code) or 'language'",
    )  # fmt: skip
    score.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="written whole or not at all")
    score.add_argument("--workers", type=int, metavar="N", help="scoring processes; default: reward.workers")
    score.add_argument("--mark-unscorable", action="store_true", help="mark malformed lines instead of refusing the file")
    _add_settings(score)
    score.set_defaults(handler=_run_score)

    report = commands.add_parser("report", help="write report.html into a run folder")
    report.add_argument("run_dir", type=Path, help="a run folder with metrics.jsonl")
    report.add_argument("--curves", type=Path, metavar="FILE.png", help="also draw the main curves as one picture")
    report.set_defaults(handler=_run_report)

    add_convert(commands)

    status = commands.add_parser("status", help="how far a run is, how fast, when it will end, and how its ranks are")
    status.add_argument("run_dir", type=Path, help="a run folder, or the folder above a pipeline's runs")
    status.set_defaults(handler=_run_status)

    preflight = commands.add_parser(
        "preflight",
        help="look at every node of a job before it begins",
        description="Started on every rank as the job will be: looks at device, collectives, disks, clock and memory, and names the "
        "nodes that are broken or much slower than the others. Exit code 3 where there are any.",
    )
    preflight.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    preflight.add_argument(
        "--disk", type=Path, action="append", default=[], metavar="DIR",
        help="folder that must take 64 MiB and give them back; {node} in it is the node's name; may be repeated",
    )  # fmt: skip
    preflight.add_argument("--bad-nodes", type=Path, metavar="FILE", help="gets the names of bad nodes, one a line")
    preflight.add_argument(
        "--slowest", type=float, default=0.5, metavar="SHARE", help="of the median speed; below it a node is bad"
    )
    preflight.set_defaults(handler=_run_preflight)

    serve = commands.add_parser(
        "serve-rollouts",
        help="hold a rollout engine for trainers on other nodes",
        description="One engine a process, until it is ended. Trainers find it with rollout.placement=disaggregated rollout.servers=DIR.",
    )
    serve.add_argument(
        "--announce", type=Path, required=True, metavar="DIR", help="folder that trainers see too; gets the engines' logs"
    )
    serve.add_argument("--address", metavar="HOST", help="under which trainers reach this node; default: its host name")
    serve.set_defaults(handler=_serve_rollouts)

    pipeline = commands.add_parser("pipeline", help="several stages, one after the other")
    pipelines = pipeline.add_subparsers(metavar="PIPELINE", required=True)
    for name, command in PIPELINES.items():
        _add_command(pipelines, name, command)
    for name, summary in RECIPE_SUMMARIES.items():
        recipe = _add_command(
            pipelines, name, Command("megatron_r1.pipeline.commands:run_recipe_command", summary, tuple(Config.model_fields))
        )
        first, last = (None, None) if name == "r1" else ("student", "student_rl")
        recipe.add_argument(
            "--from", dest="first", metavar="STAGE", default=first, help="begin with this stage; the ones before are there"
        )
        recipe.add_argument("--to", dest="last", metavar="STAGE", default=last, help="end after this stage")
        recipe.add_argument("--dry-run", action="store_true", help="check every stage's settings and print what would be done")
        recipe.set_defaults(handler=_run_recipe)
    return parser


def _add_command(commands: argparse._SubParsersAction, name: str, command: Command) -> _Parser:
    parser = commands.add_parser(
        name,
        help=command.summary,
        description=f"{command.summary[0].upper()}{command.summary[1:]}. Started again with the same config, it resumes.",
        epilog=_describe_settings(command.sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(parser)
    parser.set_defaults(command=command)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings; what it leaves out keeps its default")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")


def _describe_settings(sections: Sequence[str]) -> str:
    """Every setting that a command reads, with its default, its choices and its description."""
    defaults = flatten_config(Config())
    lines = ["settings and their defaults:"]
    for key, field in known_keys().items():
        if any(key == section or key.startswith(f"{section}.") for section in sections):
            lines.append(f"  {key}={_format_default(defaults[key])}")
            lines.extend(textwrap.wrap(_explain(field), width=100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _format_default(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _explain(field: FieldInfo) -> str:
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    parts = [field.description or "", f"One of {', '.join(choices)}." if choices else ""]
    return " ".join(part for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
