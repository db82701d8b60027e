"""What can be found out about each record by itself: filters, signature, contamination. In this process, or in several."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from megatron_r1.config.curation import CurationConfig
from megatron_r1.curation.decontaminate import EvaluationSets, Match, compared_text
from megatron_r1.curation.dedup import Signer
from megatron_r1.curation.filters import Rejection, first_failure
from megatron_r1.curation.forms import Form
from megatron_r1.curation.records import parse_line
from megatron_r1.data.record_files import RawLine
from megatron_r1.errors import DataError
from megatron_r1.process_pools import starting_processes

_CHUNK = 32  # lines that a process takes at once
_AHEAD = 4  # chunks read ahead for each process


@dataclass(frozen=True)
class Inspected:
    """What was found out about a record."""

    where: str
    offset: int  #: of its line, in bytes
    id: str
    domain: str
    rejection: Rejection | None
    signature: np.ndarray | None = None  #: [permutations] uint32; None if the record is rejected or near-duplicates stay
    match: Match | None = None  #: with an evaluation set


class Inspector:
    """Inspects records one at a time."""

    def __init__(self, config: CurationConfig, sets: EvaluationSets, seed: int) -> None:
        self._config, self._sets, self._form = config, sets, Form.of(config)
        self._signer = Signer(config.dedup, seed) if config.dedup.enabled else None

    def inspect(self, line: RawLine, source: str) -> Inspected:
        """Inspect one line.

        Raises:
            DataError: it is no conversation.
        """
        conversation = parse_line(line, source)
        named = (line.where, line.offset, conversation.id, conversation.domain)
        rejection = first_failure(conversation, self._config.filters, self._form)
        if rejection is not None:
            return Inspected(*named, rejection)
        signature = None
        if self._signer is not None:
            signature = self._signer.sign(compared_text(conversation, self._config.dedup.text))
        text = compared_text(conversation, self._config.decontamination.text)
        return Inspected(*named, None, signature, self._sets.match(text, conversation.prompt))


def inspect_all(
    lines: Iterable[RawLine], source: str, config: CurationConfig, sets: EvaluationSets, seed: int
) -> Iterator[Inspected]:
    """Inspect lines in their order, in `config.workers` processes; the result is the same for any number of them.

    Raises:
        DataError: a line is no conversation, or a process died.
    """
    if config.workers == 1:
        inspector = Inspector(config, sets, seed)
        yield from (inspector.inspect(line, source) for line in lines)
        return
    # Not forked: this process may hold threads and a device.
    with starting_processes(f"curation.workers={config.workers}", "set curation.workers=1"):
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(config.workers, context, _start_inspector, (config, sets, seed))
    with pool:
        waiting: deque[Future[list[Inspected]]] = deque()
        try:
            for chunk in _line_chunks(lines):
                waiting.append(pool.submit(_inspect_chunk, chunk, source))
                if len(waiting) >= _AHEAD * config.workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a process of curation died, probably because memory ran out: lower curation.workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _line_chunks(lines: Iterable[RawLine]) -> Iterator[list[RawLine]]:
    iterator = iter(lines)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


_inspector: Inspector | None = None  # of a worker process


def _start_inspector(config: CurationConfig, sets: EvaluationSets, seed: int) -> None:
    global _inspector
    _inspector = Inspector(config, sets, seed)


def _inspect_chunk(lines: list[RawLine], source: str) -> list[Inspected]:
    return [_inspector.inspect(line, source) for line in lines]
