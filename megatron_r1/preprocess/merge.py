"""Finished parts, in order, to one .bin and .idx."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_r1.errors import DataError
from megatron_r1.preprocess.crew import Crew, crew_for
from megatron_r1.preprocess.job import Bench, PreprocessJob, Report
from megatron_r1.preprocess.note import TokenNote, token_paths
from megatron_r1.preprocess.parts import TokenPart, read_left_out, read_lengths, read_part, remove_parts
from megatron_r1.preprocess.readers import place_of
from megatron_r1.runtime.files import write_buffer, written_atomically

_PIECE = 1 << 19  # bytes, or numbers
_WHOLE = "whole"  # name of the pair in the folder of parts, until it is whole
_INDEX_BYTES = 20  # of a sequence that is a document: its length, place and end


@dataclass(frozen=True)
class _Copy:
    """A part, and where its tokens go."""

    part: TokenPart
    offset: int  #: bytes


def merge_parts(job: PreprocessJob, crew: Crew, note: TokenNote) -> TokenNote:
    """Write .bin, .idx, the note, and the list of what was left out; then remove the parts.

    All processes copy tokens, each to its place. Every file gets its name when it is whole, the .idx last.

    Returns:
        The note with its counts.

    Raises:
        DataError: no document is left, there is no room, or a part is damaged.
    """
    parts = crew.lead(lambda: list(all_parts(job)))
    crew.lead(lambda: _check_unchanged(job))
    note = crew.lead(lambda: _counted(job, parts, note))
    offsets = np.cumsum([0, *(part.tokens for part in parts)]).tolist()
    crew.lead(lambda: _make_room(job, note))
    copies = [_Copy(part, at * job.dtype.itemsize) for part, at in zip(parts, offsets)]
    crew_for(crew, note.tokens * job.dtype.itemsize).run(job, copy_tokens, copies, lambda done, tokens: None)
    crew.lead(lambda: _make_whole(job, parts, note))
    return note


def all_parts(job: PreprocessJob) -> Iterator[TokenPart]:
    """The parts of all sources in order.

    Raises:
        DataError: one is not there.
    """
    for source in range(len(job.sources)):
        number, is_last = 0, False
        while not is_last:
            part = read_part(job.folder, source, number)
            if part is None:
                raise DataError(f"{job.folder}: part {number} of {job.sources[source].path} is missing; start again")
            yield part
            number, is_last = number + 1, part.is_last


def copy_tokens(bench: Bench, copy: _Copy, report: Report) -> None:
    """Copy the tokens of a part to their place."""
    job = bench.job
    left = copy.part.tokens * job.dtype.itemsize
    offset = copy.offset
    try:
        with (
            copy.part.tokens_path(job.folder).open("rb", buffering=0) as source,
            token_paths(job.folder / _WHOLE)[0].open("r+b", buffering=0) as target,
        ):
            while left:
                piece = source.read(min(left, _PIECE))
                if not piece:
                    raise DataError(f"{copy.part.tokens_path(job.folder)}: is cut off: remove {job.folder} and start again")
                write_buffer(target.fileno(), memoryview(piece), offset)
                offset += len(piece)
                left -= len(piece)
                report(len(piece), 0)
            os.fsync(target.fileno())
    except OSError as error:
        raise job.unwritten(error) from None


def _check_unchanged(job: PreprocessJob) -> None:
    for source in job.sources:
        try:
            stat = Path(source.path).stat()
        except OSError as error:
            raise DataError(f"{source.path}: cannot be read any more ({error.strerror})") from None
        if (stat.st_size, stat.st_mtime_ns) != (source.size, source.modified):
            raise DataError(f"{source.path}: was changed while it was read: remove {job.folder} to begin anew")


def _counted(job: PreprocessJob, parts: list[TokenPart], note: TokenNote) -> TokenNote:
    left_out: Counter[str] = Counter()
    for part in parts:
        left_out.update(part.left_out)
    documents, sequences, tokens = (sum(getattr(part, name) for part in parts) for name in ("documents", "sequences", "tokens"))
    if not documents:
        remove_parts(job)
        raise DataError(f"{job.sources[0].path}: no document is left of {sum(left_out.values())}; nothing is written")
    return replace(note, documents=documents, sequences=sequences, tokens=tokens, left_out=dict(sorted(left_out.items())))


def _make_room(job: PreprocessJob, note: TokenNote) -> None:
    needed = note.tokens * job.dtype.itemsize + note.sequences * _INDEX_BYTES
    path = token_paths(job.folder / _WHOLE)[0]
    try:
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(job.folder).free
        if free < needed:
            raise DataError(
                f"{job.output}.bin: needs {needed >> 20:,} MB beside the parts, and {free >> 20:,} MB are free; the parts stay: "
                "make room and start again"
            )
        with path.open("wb") as file:
            file.truncate(note.tokens * job.dtype.itemsize)
    except OSError as error:
        raise job.unwritten(error) from None


def _make_whole(job: PreprocessJob, parts: list[TokenPart], note: TokenNote) -> None:
    # Not above: torch is twice as large as all else here, and no other process needs it, nor this one any earlier.
    from megatron_r1.mcore import active, host

    if active.prepared_device() is None:
        host.activate("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core misses libraries for training
        from megatron_r1.mcore.index_writer import check_token_files, write_token_index

    sentences = job.options.read.sentences
    whole = job.folder / _WHOLE
    made, named = token_paths(whole), token_paths(Path(job.output))

    def lengths() -> Iterator[np.ndarray]:
        for part in parts:
            yield from _in_pieces(read_lengths(part, job.folder, job.dtype, sentences)[0])

    def counts() -> Iterator[np.ndarray]:
        for part in parts:
            yield from _in_pieces(read_lengths(part, job.folder, job.dtype, sentences)[1])

    try:
        write_token_index(made[1], job.dtype, note.sequences, note.documents, lengths, counts)
        _flush(made[1])
        check_token_files(whole)
        _list_left_out(job, parts)
        with written_atomically(named[2]) as file:
            file.write(note.as_text())
        for path, name in zip(made[:2], named):
            _give_name(path, name)
        remove_parts(job)
    except OSError as error:
        raise job.unwritten(error) from None


def _give_name(path: Path, name: Path) -> None:
    path.replace(name)


def _in_pieces(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), _PIECE):
        yield numbers[start : start + _PIECE]


def _list_left_out(job: PreprocessJob, parts: list[TokenPart]) -> None:
    """A line for each document that was left out: where it stands, why, and what is wrong with it."""
    path = left_out_path(job)
    if not any(part.left_out for part in parts):
        path.unlink(missing_ok=True)
        return
    with written_atomically(path) as file:
        before, source = 0, -1
        for part in parts:
            before = before if part.source == source else 0
            source = part.source
            for number, reason, detail in read_left_out(part, job.folder):
                where = place_of(job.sources[source], before + number)
                file.write(json.dumps({"where": where, "reason": reason, "detail": detail}, ensure_ascii=False) + "\n")
            before += part.lines


def left_out_path(job: PreprocessJob) -> Path:
    """The list of documents that were left out."""
    return Path(f"{job.output}.left_out.jsonl")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
