"""Tokenised samples in a folder: written once, one after the other, then read by all ranks from one copy in the page cache.

tokens.bin       int32, all samples end to end
offsets.npy      int64 [samples + 1], where each begins
spans.npy        int64 [spans, 2], first and last + 1 of every run of trained tokens, counted in tokens.bin
span_offsets.npy int64 [samples + 1], where the spans of each begin
groups.npy       int16 [samples], the source that each came from
store.json       what the samples were made from and a checksum; written last
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_r1.errors import DataError
from megatron_r1.types import TrainingSample

_INDEX = "store.json"
_ARRAYS = ("offsets", "spans", "span_offsets", "groups")


def write_store(folder: Path, samples: Iterable[tuple[int, TrainingSample]], describe: dict[str, Any]) -> None:
    """Write (group, sample) pairs under a temporary name, then rename it to `folder`, which is replaced.

    Args:
        describe: written into the index after all samples, so it may be filled while they are made.

    Raises:
        DataError: the folder cannot be written.
    """
    # Not named after the process: the next run overwrites what a kill left behind.
    temporary = folder.with_name(f"{folder.name}.tmp-store")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        checksum, of_trained = _write_arrays(temporary, samples)
        index = {**describe, "fingerprint": checksum, "trained": of_trained}
        (temporary / _INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: tokenised samples cannot be written ({error.strerror})") from error


def _write_arrays(folder: Path, samples: Iterable[tuple[int, TrainingSample]]) -> tuple[str, str]:
    """Returns the checksums of all samples and of those in groups from 0."""
    offsets, spans, span_offsets, groups = array("q", [0]), array("q"), array("q", [0]), array("h")
    checksum, of_trained = xxhash.xxh3_128(), xxhash.xxh3_128()
    with (folder / "tokens.bin").open("wb") as file:
        for group, sample in samples:
            tokens = np.asarray(sample.token_ids, dtype="<i4").tobytes()
            file.write(tokens)
            checksum.update(tokens)
            # The places at which the mask rises and falls; entry t of the mask belongs to token t + 1.
            edges = np.flatnonzero(np.diff(np.asarray([0, 0, *sample.loss_mask, 0], dtype=np.int8)))
            if group >= 0:
                of_trained.update(b"%d %d %d " % (group, len(tokens), len(edges)) + tokens + edges.astype("<i8").tobytes())
            spans.extend((edges + offsets[-1]).tolist())
            span_offsets.append(len(spans) // 2)
            offsets.append(offsets[-1] + len(sample.token_ids))
            groups.append(group)
    for name, values in zip(_ARRAYS, (offsets, spans, span_offsets, groups), strict=True):
        saved = np.array(values)
        checksum.update(saved.tobytes())
        np.save(folder / f"{name}.npy", saved.reshape(-1, 2) if name == "spans" else saved)
    return checksum.hexdigest(), of_trained.hexdigest()


class SampleStore:
    """The samples of a folder. Samples that nobody reads stay on the disk."""

    def __init__(self, folder: Path):
        """
        Raises:
            DataError: a missing or damaged file.
        """
        try:
            self.description: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            offsets, spans, span_offsets, groups = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS
            )
            self._offsets, self._spans, self._span_offsets, self.groups = offsets, spans, span_offsets, groups
            self._tokens = np.memmap(folder / "tokens.bin", dtype="<i4", mode="r") if offsets[-1] else np.empty(0, "<i4")
            if len(self._tokens) != offsets[-1]:
                raise ValueError("tokens.bin is cut")
        except (OSError, ValueError, IndexError, EOFError) as error:
            raise DataError(f"{folder}: tokenised samples cannot be read ({error}); remove the folder to make it again") from error

    @property
    def fingerprint(self) -> str:
        """Changes with any token, mask or group."""
        return self.description["fingerprint"]

    @property
    def of_trained(self) -> str:
        """Changes with any token or mask of a sample in a group from 0; the fingerprint, if an older version wrote the store."""
        return self.description.get("trained", self.fingerprint)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> TrainingSample:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        is_trained = np.zeros(end - start, dtype=np.int8)
        for first, last in self._spans[self._span_offsets[index] : self._span_offsets[index + 1]]:
            is_trained[first - start : last - start] = 1
        return TrainingSample(np.array(self._tokens[start:end]), is_trained[1:])


def read_description(folder: Path) -> dict[str, Any] | None:
    """What a whole store was made from; None if there is none."""
    try:
        return json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
