"""Temporary folders that no killed process leaves for ever: whoever makes the next one removes them.

A folder is locked while its process lives. The kernel gives the lock back however that ends. The number of the process would say
less: another process may have it later, and in a container it means something else.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder in the temporary directory for the block, which its user alone may read.

    Before, folders of the same prefix and user are removed whose process is gone. Where the file system has no locks nobody can
    tell, and they stay.
    """
    remove_left(prefix)
    folder, lock = _make_locked(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_left(prefix: str) -> None:
    """Remove this user's folders of a prefix in the temporary directory that no process holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # another user's, no folder, or gone
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # in use, or no locks
        finally:
            os.close(lock)


def _make_locked(prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor of its lock. Before it is locked another process may take it for one that was left."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            return folder, lock  # nobody can lock it, so nobody removes it
        if folder.is_dir():
            return folder, lock
        os.close(lock)
