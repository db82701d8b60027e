"""The command line of `preprocess`. Imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_preprocess(commands: argparse._SubParsersAction) -> None:
    """Add the command `preprocess`."""
    parser = commands.add_parser(
        "preprocess",
        help="text files into Megatron's .bin and .idx, for pretraining",
        description="Tokenise text files of any size into PREFIX_FIELD_document.bin and .idx, which Megatron-LM reads, too. Runs "
        "in one process, in several (--workers), or in the ranks of mpirun, which share the work; the files are the same. Started "
        "again, it goes on where it stopped.",
    )
    add = parser.add_argument
    add(
        "--input", type=Path, nargs="+", required=True, metavar="PATH",
        help=".jsonl, .json (an object a line), .csv, .txt or .md, each also with .gz or .zst; .parquet; or folders of such files",
    )  # fmt: skip
    add("--output-prefix", type=Path, required=True, metavar="PREFIX", help="beginning of the names of the files to make")
    add("--tokenizer", type=Path, required=True, metavar="FOLDER", help="as data.tokenizer: a folder with tokenizer.json")
    add("--text-field", default="text", metavar="FIELD", help="that has the text of a record (default: text)")
    add(
        "--text-documents", choices=("paragraphs", "lines", "files"), default="paragraphs",
        help="what a document is in .txt and .md files (default: paragraphs, which blank lines part)",
    )  # fmt: skip
    add("--append-eod", action="store_true", help="end each document with the end of sequence; pretraining wants it")
    add("--no-bos", action="store_true", help="do not begin documents with the beginning of sequence of tokenizers that have one")
    add("--split-sentences", action="store_true", help="each sentence a sequence of its own: PREFIX_FIELD_sentence")
    add(
        "--vocab-size", type=_from_one, metavar="N",
        help="of the model: tokens from N on are refused, and it decides the bytes of a token (default: the tokenizer's)",
    )  # fmt: skip
    add("--workers", type=_from_one, metavar="N", help="processes (default: 1, or the ranks of mpirun)")
    add("--skip-bad", action="store_true", help="leave bad documents out and count them, instead of ending at the first")
    add(
        "--most-document-mb", type=_from_one, default=4, metavar="N",
        help="a longer document is bad: a process needs some 100 times its size of memory (default: 4)",
    )  # fmt: skip
    add(
        "--decontaminate", nargs="+", default=[], metavar="NAME=FILE",
        help="leave out documents that share ten words in a row with a question of these evaluation sets",
    )  # fmt: skip
    add(
        "--dedup", type=_similarity, nargs="?", const=0.8, metavar="SIMILARITY",
        help="leave out documents similar to an earlier one (default: from 0.8 on); memory then grows by some 4 KB a document",
    )  # fmt: skip
    parser.set_defaults(handler=_run_command)


def _from_one(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _similarity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a similarity above 0, up to 1")
    return value


def _run_command(arguments: argparse.Namespace) -> int:
    """Raises R1Error."""
    from megatron_r1.preprocess.commands import run_preprocess

    return run_preprocess(arguments)
