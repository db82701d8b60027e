"""From arguments to a job: everything that can be wrong before the first text is read."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from megatron_r1.config.curation import DecontaminationConfig
from megatron_r1.curation.decontaminate import load_evaluation_sets
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError, FolderBusy
from megatron_r1.preprocess.job import PreprocessJob, TokenOptions
from megatron_r1.preprocess.note import TokenNote, token_dtype, token_paths
from megatron_r1.preprocess.parts import LOCK, remove_parts
from megatron_r1.preprocess.readers import ReadOptions
from megatron_r1.preprocess.sources import find_sources, part_size
from megatron_r1.runtime.file_locks import lock_file


def plan_job(arguments: argparse.Namespace, held: list[IO[str]]) -> tuple[PreprocessJob, TokenNote] | None:
    """Check the arguments, look at the sources, and take the folder of parts.

    Args:
        arguments: of the command line.
        held: gets the lock on the folder, which is held until it is closed.

    Returns:
        The job and the note without counts; None if a start before this one has done all but remove its parts.

    Raises:
        R1Error: one line on what is wrong.
    """
    tokenizer = Tokenizer.load(arguments.tokenizer)
    options = _options(arguments, tokenizer)
    load_evaluation_sets(DecontaminationConfig(evaluation_sets=options.decontaminate))  # what is wrong with them is said at once
    sources, aside = find_sources(arguments.input)
    output = _output(arguments)
    job = PreprocessJob(sources, str(arguments.tokenizer), output, options, part_size(sources), arguments.skip_bad)
    note = TokenNote(
        tokenizer.fingerprint, options.vocab_size, tokenizer.eos_id, token_dtype(options.vocab_size).name, 0, 0, 0, options.noted()
    )
    taken = [path for path in token_paths(Path(output)) if path.exists()]
    if taken and not job.folder.is_dir():
        raise DataError(f"{taken[0]}: is there already; remove it, or choose another --output-prefix")
    held.append(_lock(job.folder))
    if token_paths(Path(output))[1].exists():
        _complete_before(job)
        return None
    size = sum(source.size for source in sources)
    print(f"{output}: {len(sources):,} files, {size / 1e6:,.1f} MB, {note.dtype}", file=sys.stderr, flush=True)
    if aside:
        print(
            f"left aside in the folders: {len(aside):,} files and hidden folders that are no data, first {aside[0]}",
            file=sys.stderr,
            flush=True,
        )
    return job, note


def _complete_before(job: PreprocessJob) -> None:
    """The .idx gets its name last: only parts are left over. Another .idx would have been refused before there were parts."""
    remove_parts(job)
    print(f"{job.output}: was whole already; what was left of its parts is removed", flush=True)


def _options(arguments: argparse.Namespace, tokenizer: Tokenizer) -> TokenOptions:
    read = ReadOptions(arguments.text_field, arguments.text_documents, arguments.most_document_mb << 20, arguments.split_sentences)
    sets: dict[str, str] = {}
    for text in arguments.decontaminate:
        name, equals, path = text.partition("=")
        if not equals or not name or not path or name in sets:
            raise ConfigError(f"--decontaminate {text}: expected NAME=FILE, each name once")
        sets[name] = path
    vocab_size = arguments.vocab_size or tokenizer.vocab_size
    controls = [tokenizer.eos_id] * arguments.append_eod + tokenizer.start_ids * (not arguments.no_bos)
    if strange := [token for token in controls if token >= vocab_size]:
        raise ConfigError(f"--vocab-size {vocab_size}: token {strange[0]}, which stands around documents, is beyond it")
    return TokenOptions(read, arguments.append_eod, not arguments.no_bos, vocab_size, sets, arguments.dedup)


def _output(arguments: argparse.Namespace) -> str:
    """As Megatron-LM names it, so that its scripts find it."""
    prefix: Path = arguments.output_prefix
    if any("\ud800" <= character <= "\udfff" for character in str(prefix)):
        raise ConfigError(f"--output-prefix {prefix}: is not UTF-8, so that no config could name it; choose another name")
    if prefix.is_dir() or prefix.name in ("", ".", ".."):
        raise ConfigError(f"--output-prefix {prefix}: is a folder; add the beginning of a file's name")
    if not prefix.parent.is_dir():
        raise ConfigError(f"--output-prefix {prefix}: there is no folder {prefix.parent}")
    field = arguments.text_field.replace("/", "_")
    return f"{prefix}_{field}_{'sentence' if arguments.split_sentences else 'document'}"


def _lock(folder: Path) -> IO[str]:
    path = folder / LOCK
    try:
        folder.mkdir(exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        _take(lock, path)
    except FolderBusy:
        lock.close()
        raise
    except DataError:
        release_parts(lock)
        raise
    return lock


def _take(lock: IO[str], path: Path) -> None:
    folder = path.parent
    try:
        lock_file(lock, str(folder))
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            raise FolderBusy(f"{folder}: another process has just finished it; see what it made, or start again")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise FolderBusy(f"{folder}: is being written by {holder}; wait for it, or choose another --output-prefix") from None
    except FolderBusy:
        raise
    except ConfigError:
        print(f"{folder}: on a file system without locks; see that no other process writes there", file=sys.stderr, flush=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be locked ({error.strerror})") from None


def release_parts(lock: IO[str]) -> None:
    """Give the folder of parts back, and remove it if nothing is in it.

    The lock goes last and by itself: on NFS a file that is open still stands in its folder under another name when it was removed.
    """
    path = Path(lock.name)
    with suppress(OSError):
        if [entry.name for entry in path.parent.iterdir()] == [LOCK]:
            path.unlink()  # while it is locked: who waits for it sees that it is gone
    with suppress(OSError):  # no room for what it would say
        lock.close()
    with suppress(OSError):
        path.parent.rmdir()  # not if there are parts
