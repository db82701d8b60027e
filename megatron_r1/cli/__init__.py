"""The `megatron-r1` command: reads arguments, runs one command, turns errors into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_r1.cli.arguments import build_parser
from megatron_r1.cli.commands import run_command
from megatron_r1.cli.plan import SIMULATE
from megatron_r1.errors import R1Error, StopRequested
from megatron_r1.runtime.job import record_error, record_outcome
from megatron_r1.runtime.launch import launched_rank
from megatron_r1.runtime.open_files import raise_open_files

INTERRUPTED = 130
LONGEST_LINE = 1500  # characters of an error: a value or a name in it may be a megabyte


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, that of the R1Error, or 130 when interrupted."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(_join_words(sys.argv[1:] if argv is None else argv))
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unknown argument {rest[0]}")
    raise_open_files()
    try:
        if hasattr(arguments, "overrides"):
            arguments.overrides += rest
        if hasattr(arguments, "handler"):
            code = arguments.handler(arguments)
        else:
            code = run_command(arguments.command, arguments.config, arguments.overrides)
    except R1Error as error:
        record_error(error)
        return _end(str(error) if isinstance(error, StopRequested) else f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        record_outcome("failed", "interrupted")
        return _end("interrupted; the same command resumes", INTERRUPTED)
    record_outcome("failed" if code else "finished")
    return code


def _join_words(argv: Sequence[str]) -> list[str]:
    """`plan simulate` is one command: `plan` itself takes settings there, which argparse could not tell from names of commands."""
    return [" ".join(argv[:2]), *argv[2:]] if list(argv[:2]) == SIMULATE.split() else list(argv)


def _end(line: str, code: int) -> int:
    """Print the last line on one rank of the job, and return the exit code on all."""
    if "megatron_r1.runtime.distributed" in sys.modules:
        from megatron_r1.runtime.distributed import claim_error_line

        speaks = claim_error_line()
    else:  # the command has not got as far as importing torch
        speaks = launched_rank() == 0
    if speaks:
        print(f"megatron-r1: {_shorten(line)}", file=sys.stderr, flush=True)
    return code


def _shorten(line: str) -> str:
    """The line without what is too much of it in its middle, and without characters that would end it or move the cursor."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    if len(line) <= LONGEST_LINE:
        return line
    kept = LONGEST_LINE // 2
    return f"{line[:kept]} [... {len(line) - 2 * kept:,} more characters ...] {line[-kept:]}"
