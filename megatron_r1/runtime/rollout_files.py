"""The responses of a run: `rollouts/step_000001.jsonl`, one JSON object a line for every response of the step.

A large step is compressed: 8,192 responses of 32K tokens are about a gigabyte of text, which zstd packs in seconds; gzip would
take half a minute in which all ranks wait.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_r1.runtime.files import TEMPORARY, write_atomically
from megatron_r1.types import RolloutGroup

FOLDER = "rollouts"
_PIECE = 1 << 20  # characters that are encoded at a time


_NAME = re.compile(r"step_(\d+)\.jsonl(\.zst)?")


def write_rollouts(run_folder: Path, step: int, groups: Iterable[RolloutGroup], plain_bytes: int, most_bytes: int) -> int:
    """Write every response of the step with its rewards, then remove files of the oldest steps until the folder is small enough.

    Args:
        plain_bytes: a larger file is compressed by zstd, `step_000001.jsonl.zst`.
        most_bytes: of all files together; that of `step` stays whatever its size. 0: no limit.

    Returns:
        Number of files that were removed.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for group in groups for line in _lines_of_group(step, group))
    text, folder = "".join(lines), run_folder / FOLDER
    plain = folder / f"step_{step:06d}.jsonl"
    if len(text) > plain_bytes:
        _write_compressed(plain.with_name(f"{plain.name}.zst"), text)
    else:
        write_atomically(plain, text)
    sizes = [(path, path.stat().st_size) for path in list_rollouts(run_folder)]
    excess, removed = sum(size for _, size in sizes) - most_bytes, 0
    for path, size in sizes if most_bytes else []:
        if excess <= 0 or _step_of_file(path) >= step:
            break
        path.unlink()
        excess, removed = excess - size, removed + 1
    return removed


def list_rollouts(run_folder: Path) -> list[Path]:
    """The files of all steps that are there, oldest step first."""
    return sorted((path for path in (run_folder / FOLDER).glob("step_*") if _NAME.fullmatch(path.name)), key=_step_of_file)


def drop_rollouts_after(run_folder: Path, step: int) -> None:
    """Remove the files of later steps, which will be done again. Raises OSError."""
    for path in list_rollouts(run_folder):
        if _step_of_file(path) > step:
            path.unlink()


def _write_compressed(path: Path, text: str) -> None:
    import pyarrow  # only where a step is large: it takes long to import

    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    with temporary.open("wb") as file:
        with pyarrow.CompressedOutputStream(pyarrow.PythonFile(file, "w"), "zstd") as packed:
            for start in range(0, len(text), _PIECE):
                packed.write(text[start : start + _PIECE].encode("utf-8"))
        with temporary.open("rb") as written:  # pyarrow has closed the other
            os.fsync(written.fileno())
    temporary.replace(path)


def _step_of_file(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step_"))


def _lines_of_group(step: int, group: RolloutGroup) -> Iterator[dict[str, Any]]:
    for index, rollout in enumerate(group.rollouts):
        yield {
            "step": step,
            "prompt_id": group.prompt.id,
            "question": group.prompt.question,
            "answer": group.prompt.answer,
            "response": rollout.text,
            "reward": None if group.rewards_G is None else float(group.rewards_G[index]),
            "reward_parts": {name: values[index] for name, values in group.reward_parts.items()},
            "reward_outcomes": {name: values[index] for name, values in group.reward_outcomes.items()},
            "reward_details": {name: values[index] for name, values in group.reward_details.items() if values[index]},
            "advantage": None if group.advantages_G is None else float(group.advantages_G[index]),
            "finished": rollout.finished,
            "length": len(rollout.token_ids),
            "weights_version": group.weights_version,
        }
