"""Pretraining documents as one endless stream of tokens, cut into rows."""

from __future__ import annotations

import random
import re
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_r1.config.data import DataConfig
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
    """`<bos> document <eos> <bos> document <eos> ...`, where every token is a target exactly once."""

    def __init__(self, source: DocumentSource, tokenizer: Tokenizer, seed: int, mask_documents: bool):
        """Args: `mask_documents` keeps attention inside a document; V3 pretraining packs without it (section 4.1)."""
        self._source, self._tokenizer, self._seed, self._mask_documents = source, tokenizer, seed, mask_documents
        self._next_document = 0
        self._buffer: list[int] = []  # tokens of documents already encoded and not yet used as inputs

    def next_batch(self, batch: int, sequence_length: int) -> MicroBatch:
        """The next `batch` rows of `sequence_length` tokens with loss on every target.

        Returns:
            Without `mask_documents` [batch, sequence_length] rows. With it the same rows end to end, [1, batch x sequence_length],
            with a sequence boundary at every document and every row: a document that the end of a row cuts continues as a new
            sequence, so no sequence is longer than a row.
        """
        size = batch * sequence_length
        while len(self._buffer) <= size:  # one more: the label of the last token
            self._buffer += self._source.encode(self._next_document, self._seed, self._tokenizer)
            self._buffer.append(self._tokenizer.eos_id)
            self._next_document += 1
        stream = torch.tensor(self._buffer[: size + 1], dtype=torch.int64)
        del self._buffer[:size]
        tokens, labels = stream[:-1], stream[1:]
        # Every document ends with an end of sequence, the last one at the end of the buffer.
        ends_behind = (tokens == self._tokenizer.eos_id).flip(0).cumsum(0).flip(0) + self._buffer.count(self._tokenizer.eos_id)
        documents = self._next_document - ends_behind
        if not self._mask_documents:
            positions = torch.arange(sequence_length).repeat(batch, 1)
            shape = (batch, sequence_length)
            return MicroBatch(tokens.view(shape), labels.view(shape), torch.ones(shape), positions, documents=documents.view(shape))
        index = torch.arange(size)
        is_start = index % sequence_length == 0
        is_start[1:] |= tokens[:-1] == self._tokenizer.eos_id
        starts = index[is_start]
        positions = index - starts[is_start.cumsum(0) - 1]
        cu_seqlens = torch.cat([starts, torch.tensor([size])]).to(torch.int32)
        return MicroBatch(
            tokens[None], labels[None], torch.ones(1, size), positions[None], cu_seqlens, sample_ids=list(range(len(starts))),
            documents=documents[None],
        )  # fmt: skip

    def name_of(self, micro_batch: MicroBatch, row: int, position: int) -> str:
        """Which document of the source is at a row and a position of a batch."""
        assert micro_batch.documents is not None, "`next_batch` numbers the documents"
        return self._source.name(int(micro_batch.documents[row, position]), self._seed)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, fit for JSON: the next document and the tokens left over from the last ones."""
        return {
            "document": self._next_document,
            "buffer": list(self._buffer),
            "seed": self._seed,
            "documents": self._source.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            DataError: the seed or the documents are not those of the saved run, so the cursor means nothing.
        """
        if state["documents"] != self._source.fingerprint:
            raise DataError("data.source: the documents are not those this run began with; restore the file or start a new run_dir")
        if state["seed"] != self._seed:
            raise DataError(f"seed={self._seed} but this run began with {state['seed']}; restore it or start a new run_dir")
        self._next_document, self._buffer = state["document"], list(state["buffer"])
