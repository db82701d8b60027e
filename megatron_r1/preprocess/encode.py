"""Documents to tokens."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from itertools import chain, islice

import numpy as np

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.preprocess.documents import NEAR_DUPLICATE, Document, LotWork, Reporter
from megatron_r1.preprocess.job import Bench, Report, TokenOptions
from megatron_r1.preprocess.lots import Lot
from megatron_r1.preprocess.parts import PartWriter, read_part, read_repeats
from megatron_r1.preprocess.sentences import split_sentences

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 18, 1024  # that are encoded at once


def encode_lot(bench: Bench, lot: Lot, report: Report) -> None:
    """Write the parts of a lot that are not there yet.

    Raises:
        DataError: a bad document, unless such are skipped, or a file that cannot be read or written.
    """
    reporter = Reporter(report, lot.readers)
    work = LotWork(bench, lot, reporter, lambda number: read_part(bench.job.folder, lot.source, number) is not None)
    work.run(lambda number: _Encoding(bench, lot, number, work, reporter))


class _Encoding:
    """Makes the tokens of one part."""

    def __init__(self, bench: Bench, lot: Lot, number: int, work: LotWork, reporter: Reporter) -> None:
        job = bench.job
        self._bench, self._work, self._reporter = bench, work, reporter
        self._repeats = {} if job.options.dedup is None else read_repeats(job.folder, lot.source, number)
        self._ordinal = 0
        self._waiting: list[Document] = []
        self._characters = 0
        temporary = f"{socket.gethostname()}-{os.getpid()}"
        self._writer = PartWriter(job.folder, lot.source, number, job.dtype, job.options.read.sentences, temporary)

    def add(self, document: Document) -> None:
        """See `PartMaker`."""
        self._ordinal += 1
        if repeated := self._repeats.get(self._ordinal):
            self._writer.leave_out(document.number, NEAR_DUPLICATE, repeated)
            return
        self._waiting.append(document)
        self._characters += sum(map(len, document.text)) if isinstance(document.text, list) else len(document.text)
        if self._characters >= _BATCH_CHARACTERS or len(self._waiting) >= _BATCH_DOCUMENTS:
            self._encode()

    def leave_out(self, number: int, reason: str, detail: str) -> None:
        """See `PartMaker`."""
        self._writer.leave_out(number, reason, detail)

    def finish(self, lines: int, is_last: bool) -> None:
        """See `PartMaker`."""
        self._encode()
        self._writer.finish(lines, is_last)

    def abandon(self) -> None:
        """See `PartMaker`."""
        self._writer.abandon()

    def _encode(self) -> None:
        documents, self._waiting, self._characters = self._waiting, [], 0
        if not documents:
            return
        options = self._bench.job.options
        lengths, tokens = encode_texts(self._bench.tokenizer, [document.text for document in documents], options)
        if not all(lengths) or tokens.max() >= options.vocab_size:
            lengths, tokens = self._without_strange(documents, lengths, tokens)
        self._writer.add(lengths, tokens)
        self._reporter.add(len(tokens))

    def _without_strange(
        self, documents: Sequence[Document], lengths: list[list[int]], tokens: np.ndarray
    ) -> tuple[list[list[int]], np.ndarray]:
        """Without the documents that have no token, or one beyond the vocabulary, if those are skipped."""
        vocab_size = self._bench.job.options.vocab_size
        kept: list[list[int]] = []
        pieces = [tokens[:0]]
        ends = np.cumsum([sum(of_document) for of_document in lengths])
        for document, of_document, piece in zip(documents, lengths, np.split(tokens, ends[:-1]), strict=True):
            if not of_document:
                self._work.refuse(document.number, "an empty document: the tokenizer makes no token of it", self)
            elif piece.max() >= vocab_size:
                strange = int(piece[piece >= vocab_size][0])
                self._work.refuse(document.number, f"token {strange} is beyond the vocabulary of {vocab_size}", self)
            else:
                kept.append(of_document)
                pieces.append(piece)
        return kept, np.concatenate(pieces)


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str | list[str]], options: TokenOptions
) -> tuple[list[list[int]], np.ndarray]:
    """The tokens of documents.

    Args:
        tokenizer: theirs.
        texts: of a document, or of its sentences.
        options: what stands around a document, and whether it is cut into sentences.

    Returns:
        The lengths of the sequences of each document, and all tokens, [sum of lengths] int32.
    """
    if options.read.sentences:
        documents = [split_sentences(text) if isinstance(text, str) else text for text in texts]
    else:
        documents = [[text] for text in texts if isinstance(text, str)]
    encoded = iter(tokenizer.encode_plain_batch(list(chain.from_iterable(documents))))
    start = tokenizer.start_ids if options.bos else []
    end = [tokenizer.eos_id] if options.append_eod else []
    lengths: list[list[int]] = []
    pieces: list[list[int]] = []
    for document in documents:
        sequences = [ids for ids in islice(encoded, len(document)) if ids]
        if sequences:
            sequences[0] = start + sequences[0]
            sequences[-1] = sequences[-1] + end
        lengths.append(list(map(len, sequences)))
        pieces += sequences
    return lengths, np.fromiter(chain.from_iterable(pieces), np.int32, sum(map(len, pieces)))
