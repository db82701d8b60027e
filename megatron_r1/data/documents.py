"""Pretraining documents as one endless stream of tokens, cut into rows."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_r1.config.data import DataConfig
from megatron_r1.data.fill_in_middle import FillInMiddle
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.problems import shuffled
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.data.record_files import read_records, read_text, take_text
from megatron_r1.data.tally.arithmetic import pretraining_document
from megatron_r1.data.tally.requests import tally_chat_document
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.types import MicroBatch

#: data.source -> (question, what follows it) of a generated corpus
_GENERATED = {"tally": pretraining_document, "tally_chat": tally_chat_document}


class DocumentSource(Protocol):
    """Numbered documents; each is a function of the seed and its number."""

    fingerprint: str  #: changes when the documents change

    def encode(self, number: int, seed: int, tokenizer: Tokenizer) -> list[int]:
        """The tokens of this document of an endless stream, beginning of sequence included, end of sequence not."""

    def name(self, number: int, seed: int) -> str:
        """Which document of the source this is, for messages."""


def load_documents(config: DataConfig) -> DocumentSource:
    """A generated corpus, the `text_field` of a .jsonl or .json file, or the paragraphs of a .txt or .md file.

    Raises:
        DataError: a file that is missing, empty or malformed, with the line.
    """
    if config.source in _GENERATED:
        return GeneratedDocuments(config)
    path = Path(config.source)
    if path.suffix in (".txt", ".md"):
        return TextDocuments([part.strip() for part in re.split(r"\n\s*\n", read_text(path)) if part.strip()])
    return TextDocuments([take_text(record, config.text_field, where) for where, record in read_records(path)])


class GeneratedDocuments:
    """A noisy corpus made on demand, each question inside the template that it will be asked with."""

    def __init__(self, config: DataConfig):
        self._make, self._config = _GENERATED[config.source], config
        self._writer: tuple[Tokenizer, PromptWriter] | None = None
        asked_with = config.asked_with()
        self.fingerprint = f"{config.source}-{config.template}-{config.heldout_fraction}{asked_with or ''}"

    def encode(self, number: int, seed: int, tokenizer: Tokenizer) -> list[int]:
        """See `DocumentSource`."""
        if self._writer is None or self._writer[0] is not tokenizer:
            self._writer = tokenizer, PromptWriter(self._config, tokenizer)
        question, continuation = self._make(random.Random(f"document {seed} {number}"), self._config.heldout_fraction)
        return self._writer[1].encode(Problem("document", question, ""))[1] + tokenizer.encode(continuation)

    def name(self, number: int, seed: int) -> str:
        """See `DocumentSource`."""
        return f"generated document {number}"


class TextDocuments:
    """Given texts; every epoch visits each once, in a new order."""

    def __init__(self, texts: list[str]):
        self._texts = texts
        self.fingerprint = f"{len(texts)}-{zlib.crc32(chr(0).join(texts).encode()):08x}"

    def encode(self, number: int, seed: int, tokenizer: Tokenizer) -> list[int]:
        """See `DocumentSource`; a text is untrusted, no tag in it becomes a token."""
        return tokenizer.start_ids + tokenizer.encode_plain(self._texts[self._place(number, seed)])

    def name(self, number: int, seed: int) -> str:
        """See `DocumentSource`."""
        return f"document {self._place(number, seed) + 1} of the file"

    def _place(self, number: int, seed: int) -> int:
        epoch, offset = divmod(number, len(self._texts))
        return shuffled(len(self._texts), seed, epoch)[offset]


class DocumentStream:
    """`<bos> document <eos> <bos> document <eos> ...` cut into rows, where every token is a target exactly once.

    Row i of a phase begins `i * sequence_length` tokens after the phase's first token. Where that is follows from the documents
    before it, so every rank encodes all documents, though it makes its own rows alone: a stream is for documents that are made on
    demand or fit into memory.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        seed: int,
        mask_documents: bool,
        sequence_length: int,
        first_token: int = 0,
        fill_in_middle: FillInMiddle | None = None,
    ):
        """The rows of one phase.

        Args:
            mask_documents: keeps attention inside a document; V3 pretraining packs without it (section 4.1).
            sequence_length: tokens of a row.
            first_token: of the phase, in the stream.
            fill_in_middle: is given every document.
        """
        self._source, self._tokenizer, self._seed, self._mask_documents = source, tokenizer, seed, mask_documents
        self._sequence_length, self._first_token, self._fill_in_middle = sequence_length, first_token, fill_in_middle
        self._next_document = 0
        self._at = 0  # the token of the stream that the buffer begins with
        self._buffer: list[int] = []  # tokens of documents already encoded and not yet used as inputs

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The rows of these numbers, ascending within a call and from call to call, with loss on every target.

        Returns:
            Without `mask_documents` [rows, sequence_length]. With it the same rows end to end, [1, rows x sequence_length], with a
            sequence boundary at every document and every row: a document that the end of a row cuts continues as a new sequence, so
            no sequence is longer than a row.
        """
        rows, length = len(indices), self._sequence_length
        tokens, labels, documents = (torch.cat(parts) for parts in zip(*map(self._take, _runs(indices)), strict=True))
        if not self._mask_documents:
            positions = torch.arange(length).repeat(rows, 1)
            shape = (rows, length)
            return MicroBatch(tokens.view(shape), labels.view(shape), torch.ones(shape), positions, documents=documents.view(shape))
        size = rows * length
        index = torch.arange(size)
        is_start = index % length == 0
        is_start[1:] |= tokens[:-1] == self._tokenizer.eos_id
        starts = index[is_start]
        positions = index - starts[is_start.cumsum(0) - 1]
        cu_seqlens = torch.cat([starts, torch.tensor([size])]).to(torch.int32)
        return MicroBatch(
            tokens[None], labels[None], torch.ones(1, size), positions[None], cu_seqlens, sample_ids=list(range(len(starts))),
            documents=documents[None],
        )  # fmt: skip

    def _take(self, run: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, labels and numbers of documents of consecutive rows, end to end."""
        self._skip_to(self._first_token + run.start * self._sequence_length)
        size = len(run) * self._sequence_length
        self._fill(size + 1)  # one more: the label of the last token
        stream = torch.tensor(self._buffer[: size + 1], dtype=torch.int64)
        self._drop(size)
        tokens, labels = stream[:-1], stream[1:]
        # Every document ends with an end of sequence, the last one at the end of the buffer.
        ends_behind = (tokens == self._tokenizer.eos_id).flip(0).cumsum(0).flip(0) + self._buffer.count(self._tokenizer.eos_id)
        return tokens, labels, self._next_document - ends_behind

    def _skip_to(self, token: int) -> None:
        assert token >= self._at, "rows are asked for in ascending order"
        while self._at < token:
            self._fill(1)
            self._drop(min(token - self._at, len(self._buffer)))

    def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            document = self._source.encode(self._next_document, self._seed, self._tokenizer)
            if self._fill_in_middle is not None:
                begins = len(self._tokenizer.start_ids)
                document = document[:begins] + self._fill_in_middle(document[begins:], self._next_document)
            self._buffer += document
            self._buffer.append(self._tokenizer.eos_id)
            self._next_document += 1

    def _drop(self, size: int) -> None:
        del self._buffer[:size]
        self._at += size

    def name_of(self, micro_batch: MicroBatch, row: int, position: int) -> str:
        """Which document of the source is at a row and a position of a micro-batch."""
        assert micro_batch.documents is not None, "`micro_batch` numbers the documents"
        return self._source.name(int(micro_batch.documents[row, position]), self._seed)

    def state_dict(self) -> dict[str, Any]:
        """The cursor behind the last row that this rank took, fit for JSON; a rank that goes on further ahead skips to its row.

        It holds the next document, the tokens left over from the last ones, and where in the stream they stand.
        """
        return {
            "document": self._next_document,
            "buffer": list(self._buffer),
            "token": self._at,
            "seed": self._seed,
            "documents": self._source.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, on any rank, and in this phase or one before it.

        Raises:
            DataError: the seed or the documents are not those of the saved run, so the cursor means nothing.
        """
        if state["documents"] != self._source.fingerprint:
            raise DataError("data.source: the documents are not those this run began with; restore the file or start a new run_dir")
        if state["seed"] != self._seed:
            raise DataError(f"seed={self._seed} but this run began with {state['seed']}; restore it or start a new run_dir")
        self._next_document, self._buffer, self._at = state["document"], list(state["buffer"]), state["token"]


def _runs(indices: Sequence[int]) -> Iterator[range]:
    """Ascending numbers as runs of consecutive ones."""
    first = last = indices[0]
    for index in indices[1:]:
        if index != last + 1:
            yield range(first, last + 1)
            first = index
        last = index
    yield range(first, last + 1)
