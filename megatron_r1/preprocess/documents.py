"""The documents of a lot, part by part, and what is left out of them before anything is encoded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from megatron_r1.errors import DataError
from megatron_r1.preprocess.job import Bench, PreprocessJob, Report
from megatron_r1.preprocess.lots import Lot
from megatron_r1.preprocess.readers import Unit, count_lines, place_of, read_units, text_of

BAD, CONTAMINATED, NEAR_DUPLICATE = "bad", "contaminated", "near-duplicate"
_SECONDS_BETWEEN_REPORTS = 0.2


class Document(NamedTuple):
    """A document that may be encoded."""

    number: int  #: of its line or row, as `Unit` has it
    text: str | list[str]  #: or its sentences, where they are given


class PartMaker(Protocol):
    """Makes one part of something."""

    def add(self, document: Document) -> None:
        """The next document."""

    def leave_out(self, number: int, reason: str, detail: str) -> None:
        """What does not get in."""

    def finish(self, lines: int, is_last: bool) -> None:
        """All documents of the part are given. Args: `lines`: that begin in it, blank ones included."""

    def abandon(self) -> None:
        """The part will not be finished."""


class Reporter:
    """Sums up what is done and tells it now and then, so that whoever listens hears it five times a second at most."""

    def __init__(self, report: Report, readers: int) -> None:
        self._report, self._readers, self._told, self._tokens, self._last = report, readers, 0, 0, time.monotonic()

    def add(self, tokens: int) -> None:
        """So many more tokens are made."""
        self._tokens += tokens

    def reach(self, done: int, force: bool = False) -> None:
        """So many bytes of the source are done, from the lot's beginning."""
        if force or time.monotonic() - self._last >= _SECONDS_BETWEEN_REPORTS:
            mine = done // self._readers
            self._report(mine - self._told, self._tokens)
            self._told, self._tokens, self._last = mine, 0, time.monotonic()


class LotWork:
    """Reads the parts of a lot and gives their documents to a maker each, but for the parts that are made already."""

    def __init__(self, bench: Bench, lot: Lot, reporter: Reporter, is_made: Callable[[int], bool]) -> None:
        self._bench, self._lot, self._reporter, self._is_made = bench, lot, reporter, is_made
        self._source = bench.job.sources[lot.source]
        self._start = lot.first * bench.job.part_bytes if self._source.seekable else 0
        self._next = lot.first  # part of the lot that was not yet come to
        self._maker: PartMaker | None = None
        self._lines = 0

    def run(self, make: Callable[[int], PartMaker]) -> None:
        """Make the parts.

        Raises:
            DataError: a bad document, unless such are skipped, or a file that cannot be read or written.
        """
        job, source = self._bench.job, self._source
        try:
            last = self._read(make)
            final = self._lot.first if source.seekable else last
            for empty in range(self._next, final + 1, self._lot.readers):
                self._make_empty(empty, empty == last, make)
        except OSError as error:
            raise job.unwritten(error) from None
        except MemoryError:
            raise DataError(
                f"{source.path}: memory ran out; take fewer processes or a smaller --most-document-mb; finished parts are kept"
            ) from None
        finally:
            if self._maker is not None:
                self._maker.abandon()

    def refuse(self, number: int, detail: str, maker: PartMaker) -> None:
        """A bad document ends the work, or is left out if such are skipped."""
        if not self._bench.job.skip_bad:
            before = count_lines(self._source, self._start) if self._start else 0
            place = place_of(self._source, before + number)
            raise DataError(f"{place}: {detail} (--skip-bad leaves such documents out and counts them)")
        maker.leave_out(number, BAD, detail)

    def _read(self, make: Callable[[int], PartMaker]) -> int:
        """All parts in which something begins. Returns the number of the source's last part."""
        job, source = self._bench.job, self._source
        last = (source.parts(job.part_bytes) or 0) - 1 if source.seekable else -1
        current = -1
        done = 0
        for unit in read_units(source, job.options.read, self._start):
            number = unit.position // job.part_bytes
            if source.seekable and number > self._lot.first:
                break
            if number != current:
                self._close(False)
                current = number
                self._open(number, make)
            self._lines += 1
            if self._maker is not None and unit.raw is not None:
                self._give(unit, self._maker)
            done = unit.done - self._start
            self._reporter.reach(done)
        last = last if source.seekable else max(current, 0)
        self._close(current == last)
        self._reporter.reach(done, force=True)
        return last

    def _open(self, number: int, make: Callable[[int], PartMaker]) -> None:
        lot = self._lot
        if number < lot.first or (number - lot.first) % lot.readers:
            return
        for empty in range(self._next, number, lot.readers):
            self._make_empty(empty, False, make)
        self._next = number + lot.readers
        self._maker = None if self._is_made(number) else make(number)

    def _close(self, is_last: bool) -> None:
        maker, lines = self._maker, self._lines
        self._lines = 0
        if maker is not None:
            maker.finish(lines if self._source.seekable else 0, is_last)
            self._maker = None

    def _make_empty(self, number: int, is_last: bool, make: Callable[[int], PartMaker]) -> None:
        if not self._is_made(number):
            self._maker = make(number)
            self._close(is_last)

    def _give(self, unit: Unit, maker: PartMaker) -> None:
        try:
            text = text_of(unit, self._source, self._bench.job.options.read)
        except DataError as error:
            self.refuse(unit.number, str(error), maker)
            return
        if self._bench.job.options.decontaminate:
            whole = text if isinstance(text, str) else "\n".join(text)
            if match := self._bench.sets.match(whole, whole):
                maker.leave_out(unit.number, CONTAMINATED, f"{match.name}: {match.words}")
                return
        maker.add(Document(unit.number, text))


def finished_until(job: PreprocessJob, is_made: Callable[[int, int], bool | None]) -> int:
    """Bytes of the sources that are done when the work begins; of sources that are read from their beginning, of whole ones."""
    done = 0
    for number, source in enumerate(job.sources):
        if (parts := source.parts(job.part_bytes)) is None:
            part = 0
            while (is_last := is_made(number, part)) is False:
                part += 1
            done += source.size if is_last else 0
            continue
        sizes = (min(job.part_bytes, source.size - part * job.part_bytes) for part in range(parts))
        done += sum(size for part, size in enumerate(sizes) if is_made(number, part) is not None)
    return done
