"""The responses of a run: `rollouts/step_000001.jsonl`, one JSON object a line for every response of the step.

A large step is compressed: 8,192 responses of 32K tokens are about a gigabyte of text, which zstd packs in seconds; gzip would
take half a minute in which all ranks wait.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_r1.runtime.distributed import is_rank_zero
from megatron_r1.runtime.exchange import stream_to_rank_zero
from megatron_r1.runtime.files import TEMPORARY, write_atomically
from megatron_r1.runtime.kept_tokens import KEY, TokenColumns
from megatron_r1.types import RolloutGroup

FOLDER = "rollouts"
_PIECE = 1 << 20  # characters that are encoded at a time


_NAME = re.compile(r"step_(\d+)\.jsonl(\.zst)?")


def write_rollouts(
    run_folder: Path,
    step: int,
    groups: Sequence[RolloutGroup],
    plain_bytes: int,
    most_bytes: int,
    tokens: Mapping[tuple[int, int], TokenColumns] | None = None,
) -> int:
    """Write every response of the step with its rewards, then remove files of the oldest steps until the folder is small enough.

    Every rank sends the lines of its groups to rank 0, which writes; one group at a time beside what it may still write plain.

    Args:
        groups: of the whole step, other ranks' as outlines.
        plain_bytes: a larger file is compressed by zstd, `step_000001.jsonl.zst`.
        most_bytes: of all files together; that of `step` stays whatever its size. 0: no limit.
        tokens: of some responses of this rank's groups, see `keep_tokens`.

    Returns:
        Number of files that were removed; 0 on other ranks than 0.

    Raises:
        OSError: on rank 0, when all ranks have sent: the disk is full, or a file cannot be written.
    """

    def lines_of(number: int) -> bytes:
        lines = []
        for index, line in enumerate(_lines_of_group(step, groups[number])):
            kept = None if tokens is None else tokens.get((number, index))
            lines.append(_encode_line(line if kept is None else line | {KEY: kept.to_json()}))
        return b"".join(lines)

    with closing(stream_to_rank_zero([group.owner for group in groups], lines_of)) as stream:
        if not is_rank_zero():
            return sum(0 for _ in stream)
        pieces = (content.decode("utf-8") for content in stream)
        _write_text(run_folder / FOLDER / f"step_{step:06d}.jsonl", pieces, plain_bytes)
    sizes = [(path, path.stat().st_size) for path in list_rollouts(run_folder)]
    excess, removed = sum(size for _, size in sizes) - most_bytes, 0
    for path, size in sizes if most_bytes else []:
        if excess <= 0 or step_of_file(path) >= step:
            break
        path.unlink()
        excess, removed = excess - size, removed + 1
    return removed


def _encode_line(line: dict[str, Any]) -> bytes:
    try:
        return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write as an escape alone
        return f"{json.dumps(line)}\n".encode()


def list_rollouts(run_folder: Path) -> list[Path]:
    """The files of all steps that are there, oldest step first."""
    return sorted((path for path in (run_folder / FOLDER).glob("step_*") if _NAME.fullmatch(path.name)), key=step_of_file)


def drop_rollouts_after(run_folder: Path, step: int) -> None:
    """Remove the files of later steps, which will be done again. Raises OSError."""
    for path in list_rollouts(run_folder):
        if step_of_file(path) > step:
            path.unlink()


def _write_text(plain: Path, pieces: Iterator[str], plain_bytes: int) -> None:
    """Write the pieces one after the other; as soon as they are longer than `plain_bytes`, compressed."""
    kept: list[str] = []
    length = 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > plain_bytes:
            _write_compressed(plain.with_name(f"{plain.name}.zst"), chain(["".join(kept)], pieces))
            return
    write_atomically(plain, "".join(kept))


def _write_compressed(path: Path, texts: Iterable[str]) -> None:
    import pyarrow  # only where a step is large: it takes long to import

    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            with pyarrow.CompressedOutputStream(pyarrow.PythonFile(file, "w"), "zstd") as packed:
                for text in texts:
                    for start in range(0, len(text), _PIECE):
                        packed.write(text[start : start + _PIECE].encode("utf-8"))
            with temporary.open("rb") as written:  # pyarrow has closed the other
                os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def step_of_file(path: Path) -> int:
    """The step whose responses a file of `list_rollouts` holds."""
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
