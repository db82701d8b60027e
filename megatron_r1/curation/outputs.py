"""What a step of curation leaves: the data that it kept, what it dropped and why, and a manifest.

folder/
    conversations.jsonl   kept, in the order of the input
    rejected.jsonl        dropped: the record, the filter and why
    manifest.json         written last: counts by filter and domain, hashes, seed and settings
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_r1.curation.filters import Rejection
from megatron_r1.curation.manifest import RecordCounts, count_fields, fingerprint_file, remove_manifest, write_manifest
from megatron_r1.curation.records import Conversation
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.runtime.files import TEMPORARY, written_atomically

KEPT, REJECTED = "conversations.jsonl", "rejected.jsonl"


class StepOutputs:
    """Takes records one by one and counts them."""

    def __init__(self, kept: TextIO, rejected: TextIO) -> None:
        """Use `write_outputs`."""
        self.counts = RecordCounts()
        self.numbers: dict[str, int] = {}  #: further numbers for the manifest
        self._kept, self._rejected = kept, rejected

    def keep(self, conversation: Conversation) -> None:
        """Write a record as kept."""
        self.counts.read[conversation.domain] += 1
        self.counts.left[conversation.domain] += 1
        _write(self._kept, conversation.to_json())

    def drop(self, conversation: Conversation, rejection: Rejection) -> None:
        """Write a record as dropped."""
        self.counts.read[conversation.domain] += 1
        self.counts.drop("filter", rejection.name, conversation.domain)
        _write(self._rejected, {**conversation.to_json(), "dropped_by": rejection.name, "why": rejection.detail})


@contextmanager
def write_outputs(folder: Path, made_from: Mapping[str, Any]) -> Iterator[StepOutputs]:
    """The outputs of a step. Their files appear when the block ends well and replace those of an earlier run.

    Args:
        made_from: what the outputs depend on, for the manifest.

    Raises:
        ConfigError: the folder cannot be made.
        DataError: the files cannot be written, or nothing was kept when the block ended.
    """
    make_folder(folder)
    with written_atomically(folder / KEPT) as kept, written_atomically(folder / REJECTED) as rejected:
        results = StepOutputs(kept, rejected)
        yield results
        counts = results.counts
        if not counts.left:
            raise DataError(f"{folder}: none of {counts.read.total()} samples is accepted: {describe_losses(counts)}")
        remove_manifest(folder)
    counts.mixed = counts.left
    outputs = {name: fingerprint_file(folder / name) | {"path": name} for name in (KEPT, REJECTED)}
    write_manifest(folder, {**made_from, "counts": count_fields(counts) | results.numbers, "outputs": outputs})


def describe_losses(counts: RecordCounts) -> str:
    """How many records each filter and set dropped, the most first, on one line."""
    losses = Counter({f"filter {name}": by_domain.total() for name, by_domain in counts.filtered.items()})
    losses.update({f"evaluation set {name}": by_domain.total() for name, by_domain in counts.contaminated.items()})
    losses.update({"near-duplicates": counts.duplicates.total()} if counts.duplicates else {})
    return ", ".join(f"{name} dropped {count}" for name, count in losses.most_common()) or "there were none"


def make_folder(folder: Path) -> None:
    """Make a folder for results, and remove what a killed process left half-written in it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{TEMPORARY}*"):
            path.unlink()
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}") from None


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as a whole file. Raises DataError if it cannot be written."""
    with written_atomically(path) as file:
        for record in records:
            _write(file, record)


def _write(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
