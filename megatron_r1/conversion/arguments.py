"""The command line of the converter. Imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

_LAYOUT = {
    "tp": "tensor parallel",
    "pp": "pipeline parallel",
    "vpp": "virtual pipeline stages per rank",
    "ep": "expert parallel",
    "etp": "tensor parallel inside experts",
}


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add the command `convert` with its sub-commands import, export, verify and dry-run."""
    parser = commands.add_parser(
        "convert",
        help="Hugging Face folders to and from Megatron checkpoints",
        description=(
            "Convert models of every family (docs/megatron_core.md) between Hugging Face safetensors and Megatron's distributed "
            "checkpoints. Runs in one process, or in many started by torchrun, mpirun or srun, which share the work. Started "
            "again, it goes on where it stopped."
        ),
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    add = _adder(actions, "import", "a Hugging Face folder into a Megatron checkpoint")
    add("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make; give it as model.weights, or export it")
    _add_layout(add, "layout whose ranks find their weights in one piece; any other layout can load them too")
    add("--dtype", choices=("bf16", "fp32"), help="default: as stored, and bf16 for FP8")
    _add_common(add)

    add = _adder(actions, "export", "a Megatron checkpoint into a Hugging Face folder")
    add("--megatron", type=Path, required=True, metavar="DIR", help="converted folder, checkpoint of a run, or run")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--dtype", choices=("fp8", "bf16", "fp32"), help="default: as stored; fp8: block-scaled, deepseek_v3 only")
    add("--ema", action="store_true", help="the average of the weights, of a pretraining with pretrain.ema_decay")
    _add_common(add)

    add = _adder(actions, "verify", "compare both sides tensor by tensor; exit 2 if they differ")
    add("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    add("--megatron", type=Path, required=True, metavar="DIR", help="converted folder, checkpoint of a run, or run")

    add = _adder(actions, "dry-run", "the tensors of a config.json and the ranks that hold them, without reading weights")
    add("--config", type=Path, required=True, metavar="config.json", help="published or exported")
    _add_layout(add, "layout of which every rank is built on the meta device")
    add("--dtype", choices=("fp8", "bf16", "fp32"), help="of the Hugging Face folder; default: as the config says")
    add("--table", type=Path, metavar="FILE.tsv", help="write a line for every tensor: shape, dtype, Megatron name, ranks")


def _adder(actions: argparse._SubParsersAction, name: str, summary: str) -> Callable[..., argparse.Action]:
    parser = actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(handler=run, action=name)
    return parser.add_argument


def _add_layout(add: Callable[..., argparse.Action], purpose: str) -> None:
    for name, meaning in _LAYOUT.items():
        default = None if name == "etp" else 1
        add(f"--{name}", type=_positive_count, default=default, metavar="N", help=f"{meaning}; part of the {purpose}")


def _add_common(add: Callable[..., argparse.Action]) -> None:
    add("--max-file-size", type=_gigabytes, default=5_000_000_000, metavar="GB", help="of one file of weights (default: 5)")
    add("--verify", action="store_true", help="read both sides back and compare")


def _positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _gigabytes(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0")
    return max(1, int(value * 1e9))


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen sub-command. Returns the exit code. Raises R1Error."""
    from megatron_r1.conversion.commands import run_action

    return run_action(arguments)
