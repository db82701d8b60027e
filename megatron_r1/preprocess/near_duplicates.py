"""Near-duplicates, found before anything is encoded: signatures by all processes, comparisons by one, in their order.

What the comparison keeps (`dedup_memory`) grows with the documents that stay: some 4 KB for each at a similarity of 0.8.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.curation.dedup import NearDuplicates, dedup_memory
from megatron_r1.errors import DataError, one_line
from megatron_r1.preprocess.documents import Document, LotWork, Reporter
from megatron_r1.preprocess.job import Bench, PreprocessJob, Report, dedup_config
from megatron_r1.preprocess.lots import Lot
from megatron_r1.preprocess.parts import REPEATS, part_path
from megatron_r1.preprocess.readers import place_of
from megatron_r1.runtime.files import TEMPORARY, write_atomically
from megatron_r1.runtime.memory import free_memory

_SIGNATURES, _COUNTS = ".signatures", ".signed"
_NUMBER = np.dtype(np.int64)


def sign_lot(bench: Bench, lot: Lot, report: Report) -> None:
    """Write the signatures of the parts of a lot that are not there yet.

    Raises:
        DataError: see `LotWork.run`.
    """
    work = LotWork(bench, lot, Reporter(report, lot.readers), lambda number: is_signed(bench.job, lot.source, number) is not None)
    work.run(lambda number: _Signing(bench, lot.source, number))


def is_signed(job: PreprocessJob, source: int, number: int) -> bool | None:
    """Whether a part, which has its signatures, is the last one of its source; None if it has none."""
    counts = _read_counts(job, source, number)
    return None if counts is None else counts["is_last"]


def find_repeats(job: PreprocessJob) -> None:
    """Compare all signatures and note for each part which of its documents are left out.

    Raises:
        DataError: signatures are damaged.
    """
    config = dedup_config(job.options)
    texts = sum(counts["documents"] for source in range(len(job.sources)) for _, counts in _signed_parts(job, source))
    needed, free = dedup_memory(config, texts), free_memory()
    if needed > free:  # an upper bound: what is left out takes nothing
        print(
            f"--dedup: {texts:,} documents may take {needed >> 20:,} MB of memory in this process, {free >> 20:,} MB are free",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    known = NearDuplicates(config)
    kept: tuple[array, array] = array("i"), array("q")  # source and line or row of the documents by their index
    for source in range(len(job.sources)):
        lines = 0
        for number, counts in _signed_parts(job, source):
            repeats = {}
            numbers, signatures = _read_signatures(job, source, number, counts)
            for ordinal, (line, signature) in enumerate(zip(numbers.tolist(), signatures, strict=True), start=1):
                kept[0].append(source)
                kept[1].append(lines + line)
                if (found := known.find(len(kept[0]) - 1, signature)) is not None:
                    place = place_of(job.sources[kept[0][found[0]]], kept[1][found[0]])
                    repeats[ordinal] = f"similar to {place} ({found[1]:.2f})"
            _write_repeats(job, source, number, repeats)
            lines += counts["lines"]


def _write_repeats(job: PreprocessJob, source: int, number: int, repeats: dict[int, str]) -> None:
    try:
        write_atomically(part_path(job.folder, source, number, REPEATS), json.dumps(repeats), durable=False)
    except OSError as error:
        raise job.unwritten(error) from None


class _Signing:
    """Makes the signatures of one part."""

    def __init__(self, bench: Bench, source: int, number: int) -> None:
        self._bench = bench
        self._path, self._counts = (part_path(bench.job.folder, source, number, suffix) for suffix in (_SIGNATURES, _COUNTS))
        self._temporary = self._path.with_name(f"{self._path.name}{TEMPORARY}{socket.gethostname()}-{os.getpid()}")
        self._numbers = array("q")
        self._file = self._temporary.open("wb")

    def add(self, document: Document) -> None:
        """See `PartMaker`."""
        text = document.text if isinstance(document.text, str) else "\n".join(document.text)
        self._file.write(self._bench.signer.sign(text).tobytes())
        self._numbers.append(document.number)

    def leave_out(self, number: int, reason: str, detail: str) -> None:
        """Counted when the part is encoded."""

    def finish(self, lines: int, is_last: bool) -> None:
        """See `PartMaker`."""
        self._file.write(memoryview(self._numbers))
        self._file.close()
        self._temporary.replace(self._path)
        counts = {"lines": lines, "is_last": is_last, "documents": len(self._numbers)}
        write_atomically(self._counts, json.dumps(counts), durable=False)

    def abandon(self) -> None:
        """See `PartMaker`."""
        try:
            self._file.close()
        except OSError:
            pass  # no room for what is still buffered
        self._temporary.unlink(missing_ok=True)


def _signed_parts(job: PreprocessJob, source: int) -> Iterator[tuple[int, dict]]:
    number, is_last = 0, False
    while not is_last:
        counts = _read_counts(job, source, number)
        if counts is None:
            raise DataError(f"{job.folder}: part {number} of {job.sources[source].path} has no signatures; start again")
        yield number, counts
        is_last = counts["is_last"]
        number += 1


def _read_counts(job: PreprocessJob, source: int, number: int) -> dict[str, Any] | None:
    path = part_path(job.folder, source, number, _COUNTS)
    try:
        counts = json.loads(path.read_text())
        return {"lines": int(counts["lines"]), "documents": int(counts["documents"]), "is_last": bool(counts["is_last"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({one_line(error)}): remove {job.folder} and start again") from None


def _read_signatures(job: PreprocessJob, source: int, number: int, counts: dict) -> tuple[np.ndarray, np.ndarray]:
    path: Path = part_path(job.folder, source, number, _SIGNATURES)
    width, documents = dedup_config(job.options).permutations, counts["documents"]
    if not path.is_file() or path.stat().st_size != documents * (width * 4 + _NUMBER.itemsize):
        raise DataError(f"{path}: is damaged: remove {job.folder} and start again")
    signatures = np.fromfile(path, np.uint32, documents * width).reshape(documents, width)
    return np.fromfile(path, _NUMBER, documents, offset=documents * width * 4), signatures
