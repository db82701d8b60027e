"""The numbers of a run: `metrics.jsonl` (one JSON object a line, the record) and TensorBoard events (for looking)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_r1.errors import DataError
from megatron_r1.runtime.files import write_atomically


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; a missing file has none.

    A last line without its newline was cut by a kill and is left out. Raises DataError for any other malformed line.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise DataError(f"{path} line {number} is not a JSON object with a step: remove the line") from None
        records.append(record)
    return records


class MetricsWriter:
    """Appends to the metrics of a run folder. What was recorded after `last_step` is dropped first: it will be redone."""

    def __init__(self, folder: Path, last_step: int) -> None:
        path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and put it on the disk. A value that is no finite number is written as null."""
        record = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._events.close()
