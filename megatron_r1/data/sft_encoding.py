"""Records to training samples, here or in several processes: one process takes hours to tokenise 800,000 long samples."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.conversations import read_conversation
from megatron_r1.data.chat.load import load_template
from megatron_r1.data.chat.messages import Message, read_tools
from megatron_r1.data.chat.template import encode_conversation
from megatron_r1.data.record_files import Record
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.process_pools import starting_processes
from megatron_r1.types import TrainingSample

_PER_TASK = 32
_WINDOW = 8  # tasks of each worker in memory at a time: the records of a file are many more


@dataclass(frozen=True)
class Encoded:
    """One conversation."""

    where: str
    question: str  #: conversations with the same question go into the same part, training or validation
    samples: list[TrainingSample]  #: none if no message is trained on


class Encoder:
    """Makes samples of records. Picklable."""

    def __init__(
        self, tokenizer: Tokenizer, data: DataConfig, form: str, prompt_field: str, response_field: str, last_only: bool = False
    ):
        """Args: see `read_conversation` and `load_template`, and what they raise; `last_only`: loss on the last reply only."""
        self._template = load_template(data, tokenizer)
        self._fields, self._last_only = (form, prompt_field, response_field), last_only

    def encode(self, record: Record) -> Encoded | DataError:
        """The samples, or what is wrong with the conversation."""
        where, fields = record
        try:
            messages, tools = read_conversation(fields, where, *self._fields), read_tools(fields, where)
        except DataError as error:
            return error
        if self._last_only:
            messages = [*(replace(each, is_trained=each.role != "assistant") for each in messages[:-1]), messages[-1]]
        try:
            return Encoded(where, _question(messages), encode_conversation(messages, self._template, tools))
        except DataError as error:
            return DataError(f"{where}: {error}")


def encode_records(records: Iterable[Record], encoder: Encoder, workers: int) -> Iterator[Encoded | DataError]:
    """Every record in order, encoded by `workers` processes; by this process if 0."""
    if not workers:
        yield from map(encoder.encode, records)
        return
    # Not forked: this process may hold a device and threads.
    with starting_processes(f"sft.workers={workers}", "set sft.workers=0"):
        pool = multiprocessing.get_context("spawn").Pool(workers, initializer=_start_encoder, initargs=(encoder,))
    with pool:
        records = iter(records)
        while window := list(islice(records, workers * _WINDOW * _PER_TASK)):
            yield from pool.map(_encode_in_worker, window, chunksize=_PER_TASK)


_of_worker: Encoder | None = None


def _start_encoder(encoder: Encoder) -> None:
    global _of_worker
    _of_worker = encoder


def _encode_in_worker(record: Record) -> Encoded | DataError:
    return _of_worker.encode(record)


def _question(messages: list[Message]) -> str:
    return next((message.content for message in messages if message.role == "user"), messages[0].content)
