"""Follows a how-to page as a reader does: writes its files, runs its commands, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# ([\w./]+\.(?:py|yaml|toml))\n")


def run_in_folder(commands: str, folder: Path, timeout: float = 400.0) -> str:
    """Run commands of a shell as a reader does, and return what they printed. A command that fails ends the test."""
    python = Path(sys.executable).parent
    environment = dict(os.environ, PATH=f"{python}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def follow_page(page: str, folder: Path) -> str:
    """Follow `docs/how_to/PAGE` in a folder and return what its commands printed.

    A block of Python, YAML or TOML is a file, named in its first line; a block of bash is run.
    """
    text = (ROOT / "docs/how_to" / page).read_text(encoding="utf-8")
    printed = []
    for language, block in _BLOCK.findall(text):
        if language == "bash":
            printed.append(run_in_folder(block, folder))
            continue
        named = _FILE_NAME.match(block)
        assert named, f"{page}: the first line of a block of {language} names its file"
        (folder / named[1]).write_text(block, encoding="utf-8")
    assert printed, f"{page} has no commands"
    return "".join(printed)
