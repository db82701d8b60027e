"""Locks on files that one process at a time may write. The kernel gives them back when the process ends, however it ends.

Some file systems have none: Lustre without `-o flock`, NFS without its lock service, some of FUSE. That is an error here, since two
writers would damage a run; `runtime.file_locks=false` says that there is only one.
"""

from __future__ import annotations

import errno
import fcntl
from typing import IO

from megatron_r1.errors import ConfigError

_MISSING = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_in_use = True


def use_locks(in_use: bool) -> None:
    """Whether `lock_file` locks, from now on, in this process. A command calls it with `runtime.file_locks`."""
    global _in_use
    _in_use = in_use


def lock_file(file: IO[str] | IO[bytes], name: str) -> None:
    """Lock an open file until it is closed.

    Args:
        name: of what it protects, for the message.

    Raises:
        BlockingIOError: another process holds the lock.
        ConfigError: the file system has no locks.
        OSError: another problem.
    """
    if not _in_use:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        raise ConfigError(
            f"{name} is on a file system without locks ({error.strerror}): if no other process writes there, set "
            "runtime.file_locks=false"
        ) from None
