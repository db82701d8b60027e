"""Documents and a tokenizer from a folder of texts: what `megatron-r1 preprocess` makes token files of.

    python examples/pretrain_demo/prepare_text.py --out FOLDER [--text FOLDER] [--vocab-size N]

Without --text it fetches two Debian packages and unpacks the Debian Reference, in English and in simplified Chinese (GPL-2+).

Every text file, and every folder of text files, at the top of the folder is a source. A document is neighbouring paragraphs of one
file, some 4,000 bytes; the documents of a source are shuffled by a fixed seed, since those at the end of a source are held out. The
tokenizer has the tokens of fill in the middle.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.data.fill_in_middle import MARKS
from megatron_r1.data.record_files import read_text
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import DataError, R1Error
from megatron_r1.runtime.files import write_atomically

PACKAGES = {"english": "debian-reference-en", "chinese": "debian-reference-zh-cn"}
DOCUMENT_BYTES = 4000
VOCABULARY = 1024  #: of the tokenizer, which the models' YAML files have
MOST_SOURCES = 8  #: each is validated with, and has a curve
_TEXTS = re.compile(r"\.(txt|md)(\.gz|\.zst)?$")


def find_sources(folder: Path) -> dict[str, list[Path]]:
    """Name of each source -> its files.

    Raises:
        DataError: no folder, no texts in it, more than `MOST_SOURCES` or two of one name.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: give one with .txt or .md files")
    sources: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        below = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
        files = [file for file in below if file.is_file() and _TEXTS.search(file.name)]
        name = re.sub(r"[^\w-]+", "_", _TEXTS.sub("", entry.name))
        if files and name in sources:
            raise DataError(f"{entry}: {sources[name][0]} would be a source of the same name, {name}: rename one")
        if files:
            sources[name] = files
    if not sources:
        raise DataError(f"{folder}: no .txt or .md file below it (.gz, .zst)")
    if len(sources) > MOST_SOURCES:
        raise DataError(
            f"{folder}: {len(sources)} texts at its top, at most {MOST_SOURCES} sources: put them into folders, a source each"
        )
    return sources


def cut_documents(text: str) -> Iterator[str]:
    """Neighbouring paragraphs together until they have `DOCUMENT_BYTES`; a paragraph is never cut."""
    kept: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        if not (paragraph := paragraph.strip("\n")).strip():
            continue
        kept.append(paragraph)
        size += len(paragraph.encode())
        if size >= DOCUMENT_BYTES:
            yield "\n\n".join(kept)
            kept, size = [], 0
    if kept:
        yield "\n\n".join(kept)


def write_documents(files: list[Path], path: Path) -> list[str]:
    """Write the documents of a source as JSON lines, in an order that their number alone decides; returns them.

    Raises:
        DataError: the file is there and has other documents, of which token files may have been made.
    """
    documents = [document for file in files for document in cut_documents(read_text(file))]
    random.Random("documents").shuffle(documents)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    if path.exists() and path.read_text(encoding="utf-8") != lines:
        raise DataError(f"{path}: was made of another text: choose another --out, or remove it and what was made of it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lines)
    return documents


def fetch_debian_reference(folder: Path) -> None:
    """Fill a folder with english.txt.gz and chinese.txt.gz, unless they are there. Needs apt and dpkg-deb, and no rights.

    Raises:
        DataError: a package cannot be fetched or holds no such text.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        for name, package in PACKAGES.items():
            if (folder / f"{name}.txt.gz").exists():
                continue
            _run(["apt-get", "download", package], Path(work))
            (archive,) = Path(work).glob(f"{package}_*.deb")
            _run(["dpkg-deb", "--extract", str(archive), package], Path(work))
            texts = list(Path(work, package).rglob("debian-reference.*.txt.gz"))
            if len(texts) != 1:
                raise DataError(f"{package}: {len(texts)} texts in it, expected one: give a folder of texts with --text")
            folder.mkdir(exist_ok=True)
            texts[0].rename(folder / f"{name}.txt.gz")


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not there to fetch the Debian Reference: give a folder of texts with --text") from None
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise DataError(f"{' '.join(command)} failed ({said}): try apt-get update, or give a folder of texts with --text")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text", type=Path, help="folder of .txt and .md files; default: the Debian Reference")
    parser.add_argument("--vocab-size", type=int, default=VOCABULARY, help=f"upper bound, added tokens included ({VOCABULARY})")
    options = parser.parse_args(argv)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = options.text or out / "text"
        if options.text is None:
            fetch_debian_reference(text)
        sources = find_sources(text)
        documents = {name: write_documents(files, out / f"documents/{name}.jsonl") for name, files in sources.items()}
        texts = (text for source in documents.values() for text in source)
        tokenizer = train_tokenizer(texts, options.vocab_size, single_tokens=MARKS[0])
        tokenizer.save(out / "tokenizer")
    except R1Error as error:
        print(f"prepare_text.py: {error}", file=sys.stderr)
        return error.exit_code
    for name, source in documents.items():
        print(f"{name}: {len(source):,} documents, {sum(len(text.encode()) for text in source):,} bytes")
    print(f"{out / 'tokenizer'}: {tokenizer.vocab_size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
