"""The arguments of `megatron-r1`, one function for each group of commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_r1.cli.commands import (
    CHECK_SECTIONS,
    COMMANDS,
    EVALUATE,
    PIPELINES,
    RECIPES,
    SCORE_SECTIONS,
    Command,
    handle_check_problems,
    handle_config,
    handle_doctor,
    handle_evaluate,
    handle_preflight,
    handle_recipe,
    handle_report,
    handle_score,
    handle_serve_rollouts,
    handle_show_samples,
    handle_status,
    handle_training,
)
from megatron_r1.cli.plan import add_plan
from megatron_r1.cli.talk import add_talk
from megatron_r1.config.help import count_settings, describe_settings
from megatron_r1.conversion.arguments import add_convert
from megatron_r1.preprocess.arguments import add_preprocess

MOST_RANKS = 100_000


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments on one line, as the command line reports every other error."""

    #: Gives the end of the help. To describe all settings of all commands takes a tenth of a second, which no command is to wait.
    describe_end: Callable[[], str] | None = None

    def format_help(self) -> str:
        """See argparse."""
        if self.describe_end is not None:
            self.epilog = self.describe_end()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megatron-r1: error: {message} (see `{self.prog} --help`)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Its result has a `handler`, or a `command` with `config` and `overrides`."""
    parser = _Parser(prog="megatron-r1", description="The DeepSeek-R1 training pipeline on Megatron-Core and vLLM.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        training = _add_command(commands, name, command)
        if command.has_dry_run:
            training.add_argument("--dry-run", action="store_true", help="say what the ranks of a job would do, and start nothing")
            _add_job(training)
            training.set_defaults(name=name, handler=handle_training)
    _add_pipelines(commands)
    _add_evaluate(commands)
    _add_score(commands)
    _add_check_problems(commands)
    add_preprocess(commands)
    add_convert(commands)
    add_plan(commands)
    add_talk(commands)
    _add_config(commands)
    _add_run_folder_commands(commands)
    _add_machine_commands(commands)
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    """What a dry run looks at."""
    parser.add_argument(
        "--world-size", type=_whole_number, metavar="N", help="of a dry run: ranks of the job; default: as few as the layout needs"
    )
    parser.add_argument("--gpus-per-node", type=_whole_number, metavar="N", help="of a dry run: ranks of a node; default: 8")
    parser.add_argument("--gpu", metavar="NAME", help="of a dry run: the device whose memory is looked at; default: H800")
    parser.add_argument(
        "--mean-tokens",
        type=_whole_number,
        metavar="N",
        help="of a dry run: length of a mean response or sample; default: limit / 4",
    )
    parser.add_argument("--table", type=Path, metavar="FILE.tsv", help="of a dry run: write a line for every rank")


def _whole_number(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() else 0
    if not 0 < number <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST_RANKS:,}")
    return number


def _step(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of a step")
    return int(text)


def _add_pipelines(commands: argparse._SubParsersAction) -> None:
    pipeline = commands.add_parser("pipeline", help="several stages, one after the other")
    pipelines = pipeline.add_subparsers(metavar="PIPELINE", required=True)
    for name, command in PIPELINES.items():
        _add_command(pipelines, name, command)
    for name, command in RECIPES.items():
        recipe = _add_command(pipelines, name, command)
        first, last = (None, None) if name == "r1" else ("student", "student_rl")
        recipe.add_argument(
            "--from", dest="first", metavar="STAGE", default=first, help="begin with this stage; the ones before are there"
        )
        recipe.add_argument("--to", dest="last", metavar="STAGE", default=last, help="end after this stage")
        recipe.add_argument("--dry-run", action="store_true", help="check every stage's settings and print what would be done")
        recipe.add_argument(
            "--world-size", type=_whole_number, metavar="N", help="of a dry run: also what the N ranks of each stage's job would do"
        )
        recipe.add_argument("--gpus-per-node", type=_whole_number, metavar="N", help="of a dry run: ranks of a node; default: 8")
        recipe.add_argument("--gpu", metavar="NAME", help="of a dry run: the device whose memory is looked at; default: H800")
        recipe.set_defaults(handler=handle_recipe)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = _add_command(commands, "evaluate", EVALUATE)
    evaluate.add_argument("--rescore", action="store_true", help="score the kept responses to benchmarks again; nothing is sampled")
    evaluate.add_argument(
        "--table", nargs="+", metavar="[NAME=]RUN",
        help="print what these runs measured, and do nothing else: on benchmarks, in the recipe's tables beside published numbers; "
        "on held-out problems, side by side",
    )  # fmt: skip
    evaluate.set_defaults(handler=handle_evaluate)


def _add_score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser(
        "score",
        help="score the responses of a file",
        description="Add score, outcome (correct, wrong, error, timeout, unscorable) and detail to every line of a .jsonl file.",
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
    _add_settings(score, ("reward.answer_location", "reward.custom", "reward.math", "reward.code"), SCORE_SECTIONS)
    score.set_defaults(handler=handle_score)


def _add_check_problems(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check-problems",
        help="look for bad problems in a file before a run uses it",
        description="Read a file of problems as grpo does and report references that no scorer can read, tests that no program can "
        "pass, duplicates, missing fields, languages and lengths. Exit code: 0 if nothing was found, 1 if something was, 2 if the "
        "file cannot be read.",
    )
    check.add_argument("file", type=Path, metavar="FILE", help="problems, in any form that data.source takes")
    check.add_argument("--json", type=Path, metavar="FILE.json", help="also write the report there")
    check.add_argument("--workers", type=int, metavar="N", help="scoring processes; default: reward.workers")
    check.add_argument(
        "--no-solutions", action="store_true",
        help="do not run the reference solutions that records may hold (solution, solutions, reference_solution, code)",
    )  # fmt: skip
    shown = ("data.question_field", "data.answer_field", "data.answer_format", "data.tokenizer", "reward.domains")
    _add_settings(check, shown, CHECK_SECTIONS)
    check.set_defaults(handler=handle_check_problems)


def _add_config(commands: argparse._SubParsersAction) -> None:
    explaining = commands.add_parser(
        "config",
        help="explain settings",
        description="Say what settings are: type, default, unit, source, whether they may change when a run resumes, and which "
        "commands read them.",
    )
    explaining.add_argument("keys", nargs="*", metavar="KEY", help="a setting or a section, e.g. grpo.clip_eps; none: all sections")
    explaining.set_defaults(handler=handle_config)


def _add_run_folder_commands(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="how far a run is, how fast, when it will end, and how its ranks are")
    status.add_argument("run_dir", type=Path, help="a run folder, or the folder above a pipeline's runs")
    status.set_defaults(handler=handle_status)

    samples = commands.add_parser("show-samples", help="print the texts that a step of a pretraining run trained on")
    samples.add_argument("run_dir", type=Path, help="a run folder of pretrain")
    samples.add_argument("step", type=_step, metavar="STEP", help="number of the step, from 1")
    samples.set_defaults(handler=handle_show_samples)

    report = commands.add_parser("report", help="write report.html into a run folder")
    report.add_argument("run_dir", type=Path, help="a run folder with metrics.jsonl")
    report.add_argument("--curves", type=Path, metavar="FILE.png", help="also draw the main curves as one picture")
    report.add_argument(
        "--most-mb", type=float, metavar="N", help="megabytes of responses in the page, of all runs together (default 10)"
    )
    report.add_argument("--seed", type=int, default=0, help="decides which responses are the random ones (default 0)")
    report.add_argument(
        "--steps",
        metavar="N,N,...",
        help="show responses of these steps (default: up to 24, evenly spread)",
    )
    report.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="that of the tokens (default: the run's own)")
    report.set_defaults(handler=handle_report)


def _add_machine_commands(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser("doctor", help="what this machine has, and whether the chosen device can run")
    doctor.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="exit with 1 if this one lacks something; on a GPU what training needs is run, small: 2 if something fails",
    )  # fmt: skip
    doctor.set_defaults(handler=handle_doctor)

    preflight = commands.add_parser(
        "preflight",
        help="look at every node of a job before it begins",
        description="Started on every rank as the job will be: looks at device, collectives, disks, clock and memory, and names "
        "the nodes that are broken or much slower than the others. Exit code 3 if there are any.",
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
    preflight.set_defaults(handler=handle_preflight)

    serve = commands.add_parser(
        "serve-rollouts",
        help="hold a rollout engine for trainers on other nodes",
        description="One engine a process, until it is ended. Trainers find it with rollout.placement=disaggregated and "
        "rollout.servers=DIR.",
    )
    serve.add_argument(
        "--announce", type=Path, required=True, metavar="DIR", help="folder that trainers see too; gets the engines' logs"
    )
    serve.add_argument(
        "--address",
        metavar="HOST",
        help="of this node: where the server listens and trainers reach it; default: all addresses, and its host name",
    )
    serve.set_defaults(handler=handle_serve_rollouts)


def _add_command(commands: argparse._SubParsersAction, name: str, command: Command) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=command.summary,
        description=f"{command.summary[0].upper()}{command.summary[1:]}. Started again with the same config, it resumes.",
    )
    _add_settings(parser, command.shown, command.sections)
    parser.set_defaults(command=command)
    return parser


def _add_settings(parser: argparse.ArgumentParser, shown: Sequence[str], sections: Sequence[str]) -> None:
    """Let a command take settings: `--help` describes those that are shown, `--help-all` all of its sections."""
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings; what it leaves out keeps its default")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, sections=sections, help="show every setting that the command reads")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def describe_end() -> str:
        return (
            f"{describe_settings(shown)}\n\n`{parser.prog} --help-all` shows all {count_settings(sections)} settings that the "
            "command reads; `megatron-r1 config KEY` explains one."
        )

    assert isinstance(parser, _Parser), "subparsers are of their parser's class"
    parser.describe_end = describe_end


class _HelpAll(argparse.Action):
    """Prints the help with every setting that the command reads."""

    def __init__(self, *, sections: Sequence[str], **settings: Any) -> None:
        super().__init__(**settings, default=argparse.SUPPRESS)
        self._sections = sections

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        assert isinstance(parser, _Parser), "subparsers are of their parser's class"
        parser.describe_end = partial(describe_settings, self._sections)
        parser.print_help()
        parser.exit()
