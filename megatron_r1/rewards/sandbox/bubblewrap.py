"""What the sandbox takes from the machine: the command line of bubblewrap, and the interpreter and compiler that it shows."""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1.errors import RewardError
from megatron_r1.rewards.sandbox.seccomp import supported_machines

NOBODY = 65534  #: user and group of untrusted code: always inside, and outside if the trainer is root
FIRST_KERNEL = (5, 14)  #: counts RLIMIT_NPROC per user namespace; has pidfd_open
TEMPORARY = "/tmp"  #: the only writable folder inside
PACKAGES = "/packages"  #: folder inside with the packages that programs may import
#: without zero: a shared mapping of it takes memory that no limit counts
_DEVICES = ("null", "full", "random", "urandom")
_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64", "/usr/libexec/gcc")
_TOOLCHAIN = ("/usr/bin", "/usr/include", "/bin")


def require_host() -> None:
    """Raises:
    RewardError: this kernel or machine cannot contain untrusted code; the message says why.
    """
    if sys.platform != "linux":
        raise RewardError(f"the code sandbox needs Linux, not {sys.platform}")
    if platform.machine() not in supported_machines():
        raise RewardError(f"the code sandbox has no seccomp filter for {platform.machine()}")
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    if not found or (int(found[1]), int(found[2])) < FIRST_KERNEL:
        raise RewardError(f"the code sandbox needs Linux {'.'.join(map(str, FIRST_KERNEL))} or newer, this is {release}")


def find_bubblewrap() -> str:
    """Path of bwrap.

    Raises:
        RewardError: there is none.
    """
    path = shutil.which("bwrap")
    if path is None:
        raise RewardError("untrusted code needs bubblewrap, and there is no bwrap on the PATH: sudo apt-get install bubblewrap")
    return path


def find_compiler() -> str:
    """Path of g++ in /usr, the only place that the compiler's sandbox shows.

    Raises:
        RewardError: there is none.
    """
    path = shutil.which("g++", path="/usr/bin")
    if path is None:
        raise RewardError("C++ programs need /usr/bin/g++: sudo apt-get install g++")
    return os.path.realpath(path)


def find_python(wanted: str) -> tuple[str, str]:
    """The interpreter for untrusted code, and its prefix.

    Args:
        wanted: a path, or "" for the interpreter under the trainer's virtual environment. If the user of untrusted code cannot read
            that one (the trainer is root, and Python lies in root's home), /usr/bin/python3 is taken.

    Raises:
        RewardError: it is missing or that user cannot read it.
    """
    choices = [wanted] if wanted else [getattr(sys, "_base_executable", sys.executable), "/usr/bin/python3"]
    for path in map(os.path.realpath, choices):
        prefix = str(Path(path).parents[1]) if len(Path(path).parents) > 2 else "/usr"
        if os.path.isfile(path) and can_be_read(path) and can_be_read(prefix) and not path.startswith(f"{TEMPORARY}/"):
            return path, prefix
    raise RewardError(
        f"user {NOBODY if os.geteuid() == 0 else os.geteuid()}, which untrusted code runs as, can read no interpreter of "
        f"{', '.join(choices)}: name another in reward.code.python"
    )


def can_be_read(path: str) -> bool:
    """Whether the user of untrusted code can reach the path. If that is nobody, the permissions for everyone count."""
    if os.geteuid() != 0:
        return os.access(path, os.R_OK | os.X_OK)
    needed = stat.S_IXOTH
    return all(os.stat(part).st_mode & needed for part in (path, *map(str, Path(path).parents)))


def bubblewrap_command(
    bwrap: str,
    *,
    python: str,
    prefix: str,
    packages: Sequence[str],
    toolchain: bool,
    temporary_bytes: int,
    data: Mapping[str, int],
    executables: Mapping[str, int],
    files: Mapping[str, str],
    seccomp: int,
) -> list[str]:
    """The command up to the program. What is not named here does not exist inside: no /proc, /sys, /etc, /home or /run.

    Args:
        bwrap: path of bubblewrap.
        python: interpreter; `prefix`: its folder, of which lib is shown.
        packages: folders of importable packages that programs may use, read-only in `PACKAGES`.
        toolchain: show the compiler and the headers.
        temporary_bytes: size of /tmp.
        data: path inside -> descriptor with the content of a read-only file.
        executables: the same, executable.
        files: path inside -> file of the machine that is shown there, read-only.
        seccomp: descriptor with the filter.
    """
    arguments = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    arguments += ["--unshare-cgroup-try", "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    arguments += ["--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--seccomp", str(seccomp)]
    for path in (*_LIBRARIES, *(_TOOLCHAIN if toolchain else ())):
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for path in packages:
        arguments += ["--ro-bind", path, f"{PACKAGES}/{os.path.basename(path)}"]
    visible = {python, *([f"{prefix}/lib"] if prefix != "/usr" else [])}
    for path in sorted(visible):
        if not (toolchain and path.startswith("/usr/bin/")):
            arguments += ["--ro-bind", path, path]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for mode, contents in (("0444", data), ("0555", executables)):
        for path, descriptor in contents.items():
            arguments += ["--perms", mode, "--ro-bind-data", str(descriptor), path]
    for inside, path in files.items():
        arguments += ["--ro-bind", path, inside]
    arguments += ["--size", str(temporary_bytes), "--perms", "0700", "--tmpfs", TEMPORARY]
    return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]  # last: until then mount points are made in the root
