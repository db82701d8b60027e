"""Checkpoint folders that are complete and verified, or do not count.

    checkpoints/step_000010/
        ...              what the caller wrote, by all ranks
        state.json       small things: data cursor, counters
        manifest.json    size and SHA-256 of every file above
        COMPLETE         SHA-256 of manifest.json; written last, without it the folder is ignored

Everything is written into `.tmp-step_000010` and renamed. Hashing is shared out over the ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError
from megatron_r1.runtime.distributed import failing_together, gather_objects, on_rank_zero, rank, world_size
from megatron_r1.runtime.files import TEMPORARY, write_atomically

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and (path / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder name tells."""
    return int(checkpoint.name.removeprefix("step_"))


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Let every rank `write` its files into one new folder, then seal it. All ranks call this with the same `step`.

    `state` must survive JSON; rank 0's is kept. Raises CheckpointError on every rank where the files cannot be written.
    """
    temporary, final = folder / f"{TEMPORARY}step_{step:06d}", folder / f"step_{step:06d}"
    try:
        on_rank_zero(lambda: _make_empty(temporary))
        with failing_together():
            write(temporary)
        on_rank_zero(lambda: write_atomically(temporary / "state.json", json.dumps(state, indent=1)))
        with failing_together():
            files = _hash_files(temporary)
        on_rank_zero(lambda: seal(temporary, final, {"step": step, "files": files}))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final} cannot be written: {error.strerror}; the run can resume from the one before"
        ) from None
    return final


def verify_checkpoint(checkpoint: Path) -> None:
    """Read every file and compare it with the manifest. All ranks call this.

    Raises CheckpointError that names the first missing, truncated or changed file and what to resume from instead.
    """
    files = on_rank_zero(lambda: _read_manifest(checkpoint))
    problems = [_problem(checkpoint / name, entry) for name, entry in _share(sorted(files.items()))]
    found = [problem for of_rank in gather_objects(problems) for problem in of_rank if problem]
    if found:
        raise _corrupt(checkpoint, found[0])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given as `state`. Verify the checkpoint first."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def seal(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Turn a folder whose files are all written and flushed into the complete checkpoint `final`. Rank 0 only.

    Args:
        temporary: beside `final`, its name beginning with `TEMPORARY`.
        final: replaced where it exists.
        manifest: {"files": {path below the folder: {"bytes": int, "sha256": hex}}} for every file, and what else is to be kept.
    """
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():
        _remove(final)
    temporary.rename(final)
    write_atomically(final / COMPLETE, _sha256(final / MANIFEST))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all complete checkpoints but the `keep` newest. Rank 0 only."""
    for checkpoint in complete_checkpoints(folder)[:-keep]:
        _remove(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted write or removal left behind. Rank 0 only."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _remove(checkpoint: Path) -> None:
    """Rename first: a removal that is cut short must not leave a folder that looks complete."""
    doomed = checkpoint.with_name(f"{TEMPORARY}removed-{checkpoint.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and hash of every file under `folder`, each hashed by one rank and known to all."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    own = {}
    for name in _share(names):
        _flush(folder / name)
        own[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return {name: entry for of_rank in gather_objects(own) for name, entry in of_rank.items()}


def _flush(path: Path) -> None:
    """Put the file's bytes on the disk: a sealed checkpoint must outlive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _share(items: list[Any]) -> list[Any]:
    return items[rank() :: world_size()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    path = checkpoint / MANIFEST
    if not (checkpoint / COMPLETE).is_file():
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it holds no file {COMPLETE}")
    if not path.is_file():
        raise _corrupt(checkpoint, f"{path} is missing")
    if _sha256(path) != (checkpoint / COMPLETE).read_text(encoding="utf-8", errors="replace"):
        raise _corrupt(checkpoint, f"{path} is not what {COMPLETE} says")
    return json.loads(path.read_text(encoding="utf-8"))["files"]


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, expected {entry['bytes']}"
    if _sha256(path) != entry["sha256"]:
        return f"{path} has other content than was written (SHA-256 differs)"
    return None


def _corrupt(checkpoint: Path, problem: str) -> CheckpointError:
    older = [path for path in complete_checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    way_out = (
        f"remove {checkpoint} to resume from {older[-1].name}"
        if older
        else f"no older one exists: remove {checkpoint} to start anew"
    )
    return CheckpointError(f"corrupt checkpoint: {problem}; {way_out}")
