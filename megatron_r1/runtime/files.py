"""Files that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY = ".tmp-"  #: in the name of everything that is not yet whole


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name in the same folder, then rename it to `path`."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
