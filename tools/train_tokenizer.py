"""Train a byte-level BPE tokenizer on text of your own.

    python tools/train_tokenizer.py --input problems.jsonl --field question --field answer --vocab-size 448 --out tokenizer
    python tools/train_tokenizer.py --input novel.txt --vocab-size 32000 --out tokenizer

Writes tokenizer.json and tokenizer_config.json; give the folder as data.tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.data.chat.prompt_templates import TEMPLATES, marker_texts
from megatron_r1.data.record_files import read_records, read_text, take_text
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import DataError, R1Error


def read_texts(paths: list[Path], fields: list[str]) -> Iterator[str]:
    """The training texts: lines of .txt and .md files, the named fields of .jsonl and .json files."""
    for path in paths:
        if path.suffix in (".txt", ".md"):
            yield from read_text(path).splitlines(keepends=True)
            continue
        if not fields:
            raise DataError(f"{path}: name the fields to read with --field")
        for where, record in read_records(path):
            yield from (take_text(record, field, where) for field in fields)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, action="append", help=".jsonl, .json, .txt or .md; may be repeated")
    parser.add_argument("--field", action="append", default=[], help="field of a .jsonl or .json file; may be repeated")
    parser.add_argument("--vocab-size", type=int, required=True, help="upper bound, added tokens included")
    parser.add_argument("--template", choices=list(TEMPLATES), help="make the fixed texts of this prompt template one token each")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        single_tokens = marker_texts(options.template) if options.template else ()
        tokenizer = train_tokenizer(read_texts(options.input, options.field), options.vocab_size, single_tokens=single_tokens)
        tokenizer.save(options.out)
    except R1Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {tokenizer.vocab_size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
