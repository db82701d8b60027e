"""Checkpoint folders that are complete and verified, or do not count.

    checkpoints/step_000010/
        policy/          weights and optimizer; whatever the caller wrote, by all ranks
        config.json      the model, and beside it its tokenizer
        state.json       small things: data cursor, counters
        manifest.json    size and XXH3-128 of every file above
        COMPLETE         XXH3-128 of manifest.json; written last, without it the folder is ignored

Everything is written into `.tmp-step_000010` and renamed (see saving.py). A checkpoint found damaged is renamed to
corrupt-step_000010 and counts no more. Each rank verifies a share of the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError
from megatron_r1.runtime.distributed import gather_objects, is_rank_zero, on_rank_zero, rank, world_size
from megatron_r1.runtime.files import TEMPORARY, file_checksum, write_atomically

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
STATE = "state.json"
CORRUPT = "corrupt-"  #: before the name of a checkpoint that was found damaged


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and (path / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def verify_checkpoint(checkpoint: Path) -> None:
    """Read every file and compare it with the manifest. All ranks call this.

    Raises CheckpointError that names the first missing, truncated or changed file.
    """
    files = on_rank_zero(lambda: _read_manifest(checkpoint))
    problems = [_problem(checkpoint / name, entry) for name, entry in _share_of_this_rank(sorted(files.items()))]
    found = [problem for of_rank in gather_objects(problems) for problem in of_rank if problem]
    if found:
        raise CheckpointError(found[0])


def newest_intact(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder` whose files all verify; None if there never was one. All ranks call this.

    A newer checkpoint that does not verify is renamed to corrupt-step_N, so that it counts no more, and its problem is printed.

    Raises:
        CheckpointError: there were checkpoints and none is intact, now or at an earlier call.
    """
    while found := on_rank_zero(lambda: complete_checkpoints(folder)):
        try:
            verify_checkpoint(found[-1])
            return found[-1]
        except CheckpointError as error:
            aside = on_rank_zero(lambda: _set_aside(found[-1]))
            if is_rank_zero():
                way_on = f"using {found[-2].name} instead" if len(found) > 1 else "no older one is there"
                print(f"corrupt checkpoint: {error}; kept as {aside.name}, {way_on}", file=sys.stderr, flush=True)
    corrupt = on_rank_zero(lambda: sorted(path.name for path in folder.glob(f"{CORRUPT}*")))
    if corrupt:
        raise CheckpointError(
            f"{folder} has no intact checkpoint, only {', '.join(corrupt)}: "
            "put back a copy, or remove what is corrupt to start anew"
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint. Verify the checkpoint first."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def manifest_entry(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest, its size and hash. Its bytes are put on the disk first, so that they survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return {"bytes": size, "xxh128": file_checksum(path)}


def seal(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Turn a folder whose files are all written and flushed into the complete checkpoint `final`. Rank 0 only.

    Args:
        temporary: beside `final`, its name beginning with `TEMPORARY`.
        final: replaced if it exists.
        manifest: {"files": {path below the folder: {"bytes": int, "xxh128": hex}}} for every file, and what else is to be kept.
    """
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():
        _remove(final)
    temporary.rename(final)
    write_atomically(final / COMPLETE, file_checksum(final / MANIFEST))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all complete checkpoints but the `keep` newest. Rank 0 only."""
    for checkpoint in complete_checkpoints(folder)[:-keep]:
        _remove(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted write or removal left behind. Rank 0 only."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _set_aside(checkpoint: Path) -> Path:
    aside = checkpoint.with_name(f"{CORRUPT}{checkpoint.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{CORRUPT}{checkpoint.name}.{number}")
    return checkpoint.rename(aside)


def _remove(checkpoint: Path) -> None:
    """Rename first: a removal that is cut short must not leave a folder that looks complete."""
    doomed = checkpoint.with_name(f"{TEMPORARY}removed-{checkpoint.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _share_of_this_rank(items: list[Any]) -> list[Any]:
    return items[rank() :: world_size()]


def _read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    path = checkpoint / MANIFEST
    if not (checkpoint / COMPLETE).is_file():
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it holds no file {COMPLETE}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if file_checksum(path) != (checkpoint / COMPLETE).read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(f"{path} is not what {COMPLETE} says")
    return json.loads(path.read_text(encoding="utf-8"))["files"]


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path} has {size} bytes, expected {entry['bytes']}"
        if file_checksum(path) != entry["xxh128"]:
            return f"{path} has other content than was written (checksum differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:  # a rank that raised alone would leave the others waiting
        return f"{path} cannot be read: {error.strerror}"
    return None
