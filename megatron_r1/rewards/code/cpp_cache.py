"""Keeps what the C++ compiler has made: the standard headers in compiled form, and programs by their source.

The folder belongs to the trainer's user and only that user can write it; no untrusted code sees it. The compiler's sandbox sees one
file of it, the compiled header, read-only. What is kept for a source was made from that source alone, in a sandbox. Several
workers, also of several runs, may use the folder at once: files appear whole, by renaming.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_HEADER_SUFFIX, _PROGRAM_SUFFIX, _PART_SUFFIX = ".gch", ".program", ".part"
_DIGEST_BYTES = 32
_ABANDONED_SECONDS = 3600  #: a part of this age was left behind by a worker that was killed


@dataclass(frozen=True)
class CppCache:
    """A folder of compiled headers and programs, of bounded size. An error of the file system means only that nothing is kept."""

    folder: Path
    most_bytes: int  #: of all files together

    @classmethod
    def open(cls, most_bytes: int, parent: str | None = None) -> CppCache | None:
        """The cache of this user in the folder for temporary files, or None if there is no place that is safe.

        Args:
            most_bytes: of all files together; 0: no cache.
            parent: in place of the folder for temporary files.
        """
        if most_bytes <= 0:
            return None
        folder = Path(parent or tempfile.gettempdir()).absolute() / f"megatron-r1-cpp-{os.geteuid()}"
        try:
            with suppress(FileExistsError):
                os.mkdir(folder, 0o755)
                os.chmod(folder, 0o755)  # whatever the mask: the compiler's user must reach the headers
            return cls(folder, most_bytes) if _is_ours_alone(folder) else None
        except OSError:
            return None

    def header(self, key: str, build: Callable[[], bytes | None]) -> Path | None:
        """The compiled header of this key, or None if there is none yet: then one worker builds it, the others do not wait.

        Args:
            build: gives the content, or None.
        """
        try:
            found = self._find_header(key)
            if found is not None:
                return found
            with self._lock() as is_held:
                if not is_held:
                    return None
                found = self._find_header(key)
                content = build() if found is None else None
                if content:
                    found = self.folder / f"{key}-{len(content)}{_HEADER_SUFFIX}"
                    self._write(found, content, 0o644)  # the compiler runs as another user if the trainer is root
                return found
        except OSError:
            return None

    def program(self, key: str) -> bytes | None:
        """The executable of this key, or None."""
        path = self.folder / f"{key}{_PROGRAM_SUFFIX}"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                kept = file.read()
            os.utime(path)  # the oldest go first
        except OSError:
            return None
        digest, content = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
        return content if content and hashlib.sha256(content).digest() == digest else None

    def keep_program(self, key: str, content: bytes) -> None:
        """Keep an executable, and remove the oldest ones if there are too many bytes."""
        if len(content) > self.most_bytes // 8:
            return
        with suppress(OSError):
            self._write(self.folder / f"{key}{_PROGRAM_SUFFIX}", hashlib.sha256(content).digest() + content, 0o600)
            with self._lock() as is_held:
                if is_held:
                    self._shrink()

    def _find_header(self, key: str) -> Path | None:
        for path in self.folder.glob(f"{key}-*{_HEADER_SUFFIX}"):
            if path.name == f"{key}-{path.stat().st_size}{_HEADER_SUFFIX}" and not path.is_symlink():
                os.utime(path)
                return path
        return None

    def _write(self, path: Path, content: bytes, mode: int) -> None:
        descriptor, name = tempfile.mkstemp(suffix=_PART_SUFFIX, dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), mode)
            os.rename(name, path)
        except OSError:
            os.unlink(name)
            raise

    def _shrink(self) -> None:
        """Remove the files that were not used for longest until the rest fits, and abandoned parts."""
        files = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                found = path.stat()
                if path.suffix == _PART_SUFFIX and time.time() - found.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
                elif path.suffix in (_HEADER_SUFFIX, _PROGRAM_SUFFIX):
                    files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Whether this process alone changes the folder now. The kernel gives the lock back when a process is killed."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process holds it, or the file system has no locks
            yield False
        else:
            yield True
        finally:
            os.close(descriptor)


def _is_ours_alone(folder: Path) -> bool:
    """Whether nobody else can write the folder, or put another one into its place."""
    own, parent = os.lstat(folder), os.stat(folder.parent)
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.geteuid() or own.st_mode & 0o022:
        return False
    is_shared = bool(parent.st_mode & 0o022) and not parent.st_mode & stat.S_ISVTX
    return parent.st_uid in (0, os.geteuid()) and not is_shared
