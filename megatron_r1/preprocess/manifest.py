"""What the parts of an output are made from. Started again, a job goes on only from the same input, tokenizer and options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.preprocess.job import Bench, PreprocessJob, Report
from megatron_r1.preprocess.sources import Source
from megatron_r1.runtime.files import file_checksum, telling_times, write_atomically

_MANIFEST = "manifest.json"


def note_checksum(bench: Bench, number: int, report: Report) -> None:
    """Read a source and note its checksum in the folder of parts.

    Raises:
        DataError: it cannot be read.
    """
    source = bench.job.sources[number]
    try:
        checksum = file_checksum(Path(source.path))
        noted = [source.path, source.size, *telling_times(source.modified, source.changed), checksum]
        write_atomically(_checksum_path(bench.job, number), json.dumps(noted) + "\n", durable=False)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read, or its checksum not noted ({error.strerror})") from None
    report(source.size, 0)


def unread_sources(job: PreprocessJob) -> list[int]:
    """Those whose checksum is not known, or whose size or times are not as they were when it was noted."""
    return [number for number, source in enumerate(job.sources) if _read_noted(job, number)[:4] != _look_of(source)]


def with_checksums(job: PreprocessJob) -> PreprocessJob:
    """The job with the checksums that `note_checksum` has noted."""
    sources = [replace(source, checksum=_read_noted(job, number)[4]) for number, source in enumerate(job.sources)]
    return replace(job, sources=sources)


def compare_manifest(job: PreprocessJob, tokenizer: str) -> None:
    """Hold the job against the manifest of the parts that are there, or write one.

    Args:
        job: with checksums.
        tokenizer: its fingerprint.

    Raises:
        DataError: the parts are made from something else; it is named.
    """
    path = job.folder / _MANIFEST
    now: dict[str, Any] = {
        "tokenizer": tokenizer,
        "options": job.options.noted(),
        "part_bytes": job.part_bytes,
        "evaluation_sets": {name: _set_checksum(file) for name, file in sorted(job.options.decontaminate.items())},
        "sources": [source.content for source in job.sources],
    }
    if not path.exists():
        try:
            write_atomically(path, json.dumps(now, indent=1) + "\n")
        except OSError as error:
            raise job.unwritten(error) from None
        return
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        difference = _changed_input(before, now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is damaged ({error}): remove {job.folder} to begin anew") from None
    if difference:
        raise DataError(f"{difference}; restore it, or remove {job.folder} to begin anew")


def _set_checksum(file: str) -> str:
    try:
        return file_checksum(Path(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _changed_input(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    if before["tokenizer"] != now["tokenizer"]:
        return "--tokenizer: is another than the one that the finished parts are made with"
    for name, value in now["options"].items():
        if before["options"].get(name) != value:
            return f"{name}: is {value}, the finished parts are made with {before['options'].get(name)}"
    if before["evaluation_sets"] != now["evaluation_sets"]:
        return "--decontaminate: an evaluation set has other content than when the finished parts were made"
    return _different_source(before["sources"], now["sources"]) or _different_parts(before, now)


def _different_source(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str | None:
    for old, new in zip(before, now):
        if (old["bytes"], old["checksum"]) != (new["bytes"], new["checksum"]):
            return f"{new['path']}: has other content than {old['path']} when the finished parts were made"
    if len(before) != len(now):
        return f"--input: gives {len(now)} files, the finished parts are made from {len(before)}"
    return None


def _different_parts(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    return None if before["part_bytes"] == now["part_bytes"] else "the finished parts have another size"


def _checksum_path(job: PreprocessJob, number: int) -> Path:
    return job.folder / f"{number:05d}.checksum"


def _look_of(source: Source) -> list[Any]:
    return [source.path, source.size, source.modified, source.changed]


def _read_noted(job: PreprocessJob, number: int) -> list[Any]:
    try:
        return json.loads(_checksum_path(job, number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
