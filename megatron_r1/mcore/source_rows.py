"""The rows of one tokenised source without end, on Megatron-Core's GPTDataset.

GPTDataset shuffles the documents of all epochs that a run needs together, so that a longer run would see another order from its
first row on. Here an epoch, or a few, is a GPTDataset of its own with its own seed: the first epoch, the second, then two, four,
..., so that a small source that is used often costs few files. Each has its index in a folder, which is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.fill_in_middle import ADDED, FilledDocuments, FillInMiddle, chosen_of
from megatron_r1.data.token_files import TokenFile
from megatron_r1.errors import ConfigError, DataError, one_line
from megatron_r1.mcore.active import require_active
from megatron_r1.runtime.file_locks import lock_file
from megatron_r1.runtime.files import TEMPORARY
from megatron_r1.runtime.waiting import give_sign

require_active()

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

_LABEL = "source"  # in place of the path, which Megatron's names of files would follow


@dataclass(frozen=True)
class Filling:
    """Fill in the middle for a part of a source."""

    fill: FillInMiddle
    start_ids: tuple[int, ...]  #: that documents may begin with
    eos_id: int  #: that they may end with
    chosen: int  #: documents of the part to which it is done, see `count_chosen`

    @property
    def identity(self) -> str:
        """What it decides, with the seed and the source."""
        fill = self.fill
        return f"fill in the middle {fill.rate} {fill.begin} {fill.hole} {fill.end} {self.start_ids} {self.eos_id}"


@dataclass(frozen=True)
class SourcePart:
    """Some of a source's documents."""

    file: TokenFile
    identity: str  #: what `TokenFile.identify` says of it
    documents: range
    filling: Filling | None = None  #: None: they stay as they are

    @property
    def tokens(self) -> int:
        """Of all its documents."""
        return self.file.tokens_of(self.documents) + (ADDED * self.filling.chosen if self.filling else 0)

    def follows_from(self, seed: int) -> str:
        """What the order of its rows follows from, beside their length."""
        filling = "" if self.filling is None else f" {self.filling.identity}"
        return f"{self.identity} {self.documents} {seed}{filling}"

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """[n] tokens of some documents, by their numbers [n]."""
        lengths = self.file.lengths[documents]
        if self.filling is None:
            return lengths
        return lengths + ADDED * chosen_of(self.filling.fill, lengths, documents, len(self.filling.start_ids))


def order_of(part: SourcePart, sequence_length: int, seed: int) -> str:
    """Changes with anything that decides which tokens of a source are in which row, but for the tokens themselves."""
    return f"{part.follows_from(seed)} {sequence_length}"


@dataclass(frozen=True)
class EpochGroup:
    """Epochs that are shuffled together."""

    number: int
    epochs: int
    first_row: int
    rows: int


def epoch_groups(tokens: int, sequence_length: int, rows: int) -> list[EpochGroup]:
    """The groups that hold at least so many rows of a source of so many tokens: 1, 1, 2, 4, 8, ... epochs.

    Rows of a group are cut from its tokens end to end, each with one token more, its last label.
    """
    groups: list[EpochGroup] = []
    first_row = 0
    for number in count():
        epochs = 1 if number == 0 else 1 << (number - 1)
        held = (epochs * tokens - 1) // sequence_length
        groups.append(EpochGroup(number, epochs, first_row, held))
        first_row += held
        if first_row >= rows:
            return groups
    raise AssertionError("unreachable")


def _index_bytes(documents: int, group: EpochGroup) -> int:
    """Size on disk of the index of a group: 4 bytes a document and 12 a row of each epoch.

    Its making holds about twice as much in memory, and 4 bytes a document more with fill in the middle; a rank that reads maps it.
    """
    return 4 * documents * group.epochs + 12 * group.rows + 8


class SourceRows:
    """Rows of a part of a source, as many as were asked for at least.

    Args:
        part: with more tokens than a row has.
        sequence_length: tokens of a row.
        seed: of the order.
        rows: that will be read at most.
        cache: folder of the indices, which must be there (`build`).
    """

    def __init__(self, part: SourcePart, sequence_length: int, seed: int, rows: int, cache: Path) -> None:
        self._part, self._sequence_length, self._cache = part, sequence_length, cache
        self._groups = epoch_groups(part.tokens, sequence_length, rows)
        self.data = part.follows_from(seed)
        self._order = order_of(part, sequence_length, seed)
        self._firsts = [group.first_row for group in self._groups]
        self._file = IndexedDataset(part.file.prefix)
        self._datasets: dict[int, GPTDataset] = {}
        # what Megatron-Core's BlendedDataset asks of a dataset
        self.index_split = Split.train
        self.unique_identifiers: Mapping[str, Any] = OrderedDict(order=self._order)

    def __len__(self) -> int:
        return self._groups[-1].first_row + self._groups[-1].rows

    @property
    def order(self) -> str:
        """See `order_of`."""
        return self._order

    @property
    def is_built(self) -> bool:
        """Whether all its indices are there."""
        return all(self._folder(group).is_dir() for group in self._groups)

    def index_sizes(self) -> dict[str, int]:
        """Name of each index -> its size on disk."""
        documents = len(self._part.documents)
        return {self._folder(group).name: _index_bytes(documents, group) for group in self._groups}

    def build(self) -> None:
        """Make the indices that are not there yet. One process does it. Raises OSError if they cannot be written."""
        for group in self._groups:
            give_sign()
            build_folder(self._folder(group), lambda temporary, group=group: self._open(group, temporary, is_new=True))

    def open(self) -> None:
        """Map the indices. Raises DataError if one is not there."""
        for group in self._groups:
            folder, documents = self._folder(group), len(self._part.documents)
            shapes = {
                "document_index": (documents * group.epochs,),
                "sample_index": (group.rows + 1, 2),
                "shuffle_index": (group.rows,),
            }
            check_index(folder, shapes)
            try:
                self._datasets[group.number] = self._open(group, folder, is_new=False)
            except (OSError, ValueError) as error:
                raise broken_index(folder, error) from None

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A row: its tokens and one more [sequence_length + 1] int64, the numbers of its documents, and where in it they begin."""
        group = self._groups[int(np.searchsorted(self._firsts, number, side="right")) - 1]
        dataset, place = self._datasets[group.number], number - group.first_row
        tokens, documents = dataset._query_document_sample_shuffle_indices(place)
        skipped = int(dataset.sample_index[dataset.shuffle_index[place]][1])
        ends = np.cumsum(self._part.lengths_of(documents), dtype=np.int64) - skipped
        return tokens, documents, np.concatenate([[0], ends[:-1]])

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        tokens, documents, starts = self.read(number)
        return {"tokens": tokens, "documents": documents, "starts": starts}

    def _folder(self, group: EpochGroup) -> Path:
        return self._cache / f"rows-{checksum_of(self._order, group.number)}"

    def _open(self, group: EpochGroup, folder: Path, *, is_new: bool) -> GPTDataset:
        seed = zlib.crc32(f"{self._order} {group.number}".encode())
        config = dataset_config(self._sequence_length, seed, folder, is_new=is_new)
        # A rank that reads needs no list of documents, which takes memory for each.
        documents = np.arange(self._part.documents.start, self._part.documents.stop, dtype=np.int32) if is_new else None
        filling, file = self._part.filling, self._file
        if filling is not None:
            file = FilledDocuments(file, filling.fill, group.number, filling.start_ids, filling.eos_id)
        return GPTDataset(file, _LABEL, documents, group.rows, Split.train, config)


class _NoTokenizer:
    """The datasets ask for a tokenizer; what they would ask of it (padding, masks at its end of a document) is not used."""

    vocab_size = eod = None
    unique_identifiers: Mapping[str, Any] = OrderedDict()


def dataset_config(sequence_length: int, seed: int, folder: Path, *, is_new: bool) -> GPTDatasetConfig:
    """Settings of a dataset of Megatron-Core that makes its index in a folder (`is_new`), or maps the one that is there."""
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([_LABEL], None), None, None],
        path_to_cache=str(folder),
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        fast_cache_load=not is_new,
    )


def checksum_of(*parts: object) -> str:
    """A short name for what these parts decide."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def build_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill a folder that appears whole under its name, unless it is there; under `building`. Raises OSError."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f"{folder.name}{TEMPORARY}{os.getpid()}")
    temporary.mkdir()
    build(temporary)
    temporary.rename(folder)


@contextmanager
def building(cache: Path) -> Iterator[None]:
    """For the block this process alone builds in the folder, and nothing half made is left in it. It waits for another's end.

    Raises:
        ConfigError: the folder cannot be written, or its file system has no locks.
    """
    with writing_into(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("a") as file:
            while True:
                try:
                    lock_file(file, f"data.index_cache {cache}")
                    break
                except BlockingIOError:
                    give_sign()
                    time.sleep(0.5)
            for left in cache.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield


@contextmanager
def writing_into(cache: Path) -> Iterator[None]:
    """Raises ConfigError where the block cannot look into the folder, or write into it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.index_cache {cache} cannot be written ({error.strerror}): name a folder that this process can write into"
        ) from None


def check_index(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether an index holds the arrays that it must, before Megatron-Core loads them: it takes pickles, which run code, too.

    Args:
        shapes: what a file's name ends in, before .npy -> shape of its numbers.

    Raises:
        DataError: it does not.
    """
    for ending, shape in shapes.items():
        try:
            paths = list(folder.glob(f"*-{ending}.npy"))
            if len(paths) != 1:
                raise ValueError(f"{len(paths)} files *-{ending}.npy")
            found = np.lib.format.open_memmap(paths[0], mode="r")
            if found.shape != shape or found.dtype.kind not in "iu":
                raise ValueError(f"{paths[0].name} has {found.dtype.name} {found.shape}, not whole numbers {shape}")
        except Exception as error:  # noqa: BLE001 - of a header of rubbish numpy raises what its parsing raised
            raise broken_index(folder, error) from None


def broken_index(folder: Path, error: Exception) -> DataError:
    """The error for an index that cannot be mapped."""
    if not folder.is_dir():
        return DataError(f"{folder}: is not there on this node: data.index_cache must be a folder that all nodes see")
    return DataError(f"{folder}: the index cannot be read ({one_line(error)}): remove the folder, and it is made again")
