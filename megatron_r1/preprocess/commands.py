"""`megatron-r1 preprocess`: text files to Megatron's token files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import IO, Self

from megatron_r1.preprocess.crew import Crew, crew_for, gather_crew
from megatron_r1.preprocess.documents import BAD, finished_until
from megatron_r1.preprocess.encode import encode_lot
from megatron_r1.preprocess.job import PreprocessJob
from megatron_r1.preprocess.lots import deal_lots
from megatron_r1.preprocess.manifest import compare_manifest, note_checksum, unread_sources, with_checksums
from megatron_r1.preprocess.merge import left_out_path, merge_parts
from megatron_r1.preprocess.near_duplicates import find_repeats, is_signed, sign_lot
from megatron_r1.preprocess.note import TokenNote
from megatron_r1.preprocess.parts import read_part
from megatron_r1.preprocess.plan import plan_job, release_parts
from megatron_r1.runtime.launch import read_ranks, set_environment
from megatron_r1.runtime.progress import Progress

_SHOWN = 5  # bad documents that are named on the screen


def run_preprocess(arguments: argparse.Namespace) -> int:
    """Run the command; every process of an MPI job calls this. Returns the exit code.

    Raises:
        R1Error: one line on what is wrong with arguments, input or disk.
    """
    crew = gather_crew(read_ranks(), arguments.workers)
    set_environment({"TOKENIZERS_PARALLELISM": "false"})  # as many processes as were asked for, and no threads of theirs
    held: list[IO[str]] = []  # the lock
    try:
        planned = crew.lead(lambda: plan_job(arguments, held))
        if planned is not None:
            _preprocess(*planned, crew)
    finally:
        for lock in held:
            release_parts(lock)
    return 0


def _preprocess(job: PreprocessJob, note: TokenNote, crew: Crew) -> None:
    unread = crew.lead(lambda: unread_sources(job))
    unread_bytes = sum(job.sources[number].size for number in unread)
    with _Shown(crew, "checksums", unread_bytes) as shown:
        crew_for(crew, unread_bytes).run(job, note_checksum, unread, shown.report)
    job = crew.lead(lambda: with_checksums(job))
    crew.lead(lambda: compare_manifest(job, note.tokenizer))
    size = sum(source.size for source in job.sources)
    if job.options.dedup is not None:

        def signed(source: int, part: int) -> bool | None:
            return is_signed(job, source, part)

        lots, done = crew.lead(lambda: _what_is_left(job, crew, signed))
        with _Shown(crew, "signatures", size, done) as shown:
            crew.run(job, sign_lot, lots, shown.report)
        crew.lead(lambda: find_repeats(job))

    def encoded(source: int, part: int) -> bool | None:
        found = read_part(job.folder, source, part)
        return None if found is None else found.is_last

    lots, done = crew.lead(lambda: _what_is_left(job, crew, encoded))
    if done and crew.leads:
        print(f"going on: {done / 1e6:,.1f} of {size / 1e6:,.1f} MB are done", file=sys.stderr, flush=True)
    with _Shown(crew, "preprocess", size, done) as shown:
        crew.run(job, encode_lot, lots, shown.report)
    note = merge_parts(job, crew, replace(note, sources=[source.content for source in job.sources]))
    if crew.leads:
        _summarise(job, note)


def _what_is_left(job: PreprocessJob, crew: Crew, is_made: Callable[[int, int], bool | None]) -> tuple[list, int]:
    """The lots of what is not made, and the bytes that are."""
    return deal_lots(job.sources, job.part_bytes, crew.size, is_made), finished_until(job, is_made)


class _Shown:
    """Progress in bytes of the sources, with tokens and their rate."""

    def __init__(self, crew: Crew, name: str, total: int, done: int = 0) -> None:
        self._progress = Progress(total, name, done, enabled=crew.leads and total > done, unit="B")
        self._tokens, self._started = 0, time.monotonic()

    def report(self, done: int, tokens: int) -> None:
        """See `Report`. Shares that begin in the middle of a source may count a few bytes twice."""
        self._tokens += tokens
        if self._tokens:
            rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
            self._progress.show({"tokens": self._tokens, "tokens/s": rate})
        self._progress.advance(min(done, self._progress.total - self._progress.done))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._progress.done < self._progress.total:
            self.report(self._progress.total - self._progress.done, 0)
        self._progress.close()


def _summarise(job: PreprocessJob, note: TokenNote) -> None:
    left = ", ".join(f"{count:,} {reason}" for reason, count in note.left_out.items()) or "none"
    sentences = f", {note.sequences:,} sentences" if job.options.read.sentences else ""
    made = f"{note.documents:,} documents{sentences}, {note.tokens:,} tokens ({note.dtype})"
    print(f"{job.output}: {made}; left out: {left}", flush=True)
    if note.left_out.get(BAD):
        path = left_out_path(job)
        shown = 0
        with path.open(encoding="utf-8") as file:
            for line in file:
                found = json.loads(line)
                if found["reason"] == BAD:
                    print(f"left out: {found['where']}: {found['detail']}", file=sys.stderr)
                    shown += 1
                if shown == _SHOWN:
                    break
        if note.left_out[BAD] > shown:
            print(f"... and {note.left_out[BAD] - shown:,} more in {path}", file=sys.stderr, flush=True)
