"""Who writes which parts. Every part is in one lot, and what is written does not depend on how the parts are dealt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_r1.preprocess.sources import Source


@dataclass(frozen=True)
class Lot:
    """Parts `first`, `first + readers`, ... of a source; of a seekable one the part `first` alone."""

    source: int
    first: int = 0
    readers: int = 1  #: that read the source from its beginning, each for its own parts


def deal_lots(
    sources: Sequence[Source], part_bytes: int, workers: int, is_finished: Callable[[int, int], bool | None]
) -> list[Lot]:
    """The lots of what is not finished.

    A source that can be read only from its beginning has one reader while there are as many such sources as workers, else several:
    then each unpacks the whole source, which takes some hundredths of the time of its tokens.

    Args:
        sources: all of them.
        part_bytes: of a part.
        workers: that will take lots.
        is_finished: (source, part) -> None if the part is not there, else whether it is the last one of its source.
    """
    streams = [number for number, source in enumerate(sources) if not source.seekable]
    readers = max(1, -(-workers // max(1, len(streams))))
    lots: list[Lot] = []
    for number, source in enumerate(sources):
        if (parts := source.parts(part_bytes)) is not None:
            lots += [Lot(number, part) for part in range(parts) if is_finished(number, part) is None]
        elif not _is_whole(number, is_finished):
            lots += [Lot(number, first, readers) for first in range(readers)]
    return lots


def _is_whole(source: int, is_finished: Callable[[int, int], bool | None]) -> bool:
    """Whether all parts of a source are there up to its last one."""
    part = 0
    while (is_last := is_finished(source, part)) is False:
        part += 1
    return is_last is True
