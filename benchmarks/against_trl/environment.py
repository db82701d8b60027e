"""TRL in an environment of its own: its packages would not fit beside this project's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from megatron_r1.errors import ConfigError, R1Error
from megatron_r1.runtime.files import write_atomically

#: TRL and what decides its speed. torch is that of this project, so that both have the same kernels.
PACKAGES = {
    "trl": "1.16.0",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
}
_STAMP = "packages.txt"  #: written last, so that an environment that was left half-way is made again


class EnvironmentFailed(R1Error):
    """TRL could not be installed."""

    exit_code = 1


def default_folder() -> Path:
    """In the user's folder for caches."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "megatron_r1", f"trl-{PACKAGES['trl']}")


def versions() -> dict[str, str]:
    """Package -> version, torch first."""
    return {"torch": version("torch").partition("+")[0], **PACKAGES}


def make_environment(folder: Path, torch_index: str | None) -> Path:
    """The interpreter of an environment with `versions()`; one that is there with them is taken as it is.

    Args:
        folder: of the environment.
        torch_index: where pip finds torch; None: its default index, whose build for Linux is of several gigabytes, for CUDA.

    Raises:
        ConfigError: the folder holds something else.
        EnvironmentFailed: a package could not be installed.
    """
    python, wanted = folder / "bin/python", "".join(f"{name}=={number}\n" for name, number in versions().items())
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return python
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file()):
        raise ConfigError(f"--environment {folder} is no Python environment, and would be overwritten: name another folder")
    print(f"making TRL's environment in {folder} (a minute or two after the downloads)", flush=True)
    torch, *others = wanted.split()
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*install, *(["--index-url", torch_index] if torch_index else []), torch])
    _run([*install, torch, *others])
    write_atomically(stamp, wanted)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")
        raise EnvironmentFailed(f"{' '.join(command[1:4])} failed: {last.strip()}")
