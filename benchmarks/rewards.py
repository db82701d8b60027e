"""All benchmarks of the rewards, one after the other; each also runs by itself and has more options.

    python -m benchmarks.rewards --data FOLDER [--limit N] [--out FOLDER]

FOLDER holds math/, code/ and language/ with the data files as their authors publish them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import positive

PARTS = {"rewards_math": "math", "rewards_code": "code", "rewards_pool": ""}  #: module -> its part of the data


def main() -> int:
    """Returns the first exit code that is not 0, after all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the published data files")
    parser.add_argument("--limit", type=positive, help="problems of each source; default: all")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write the figures of each part into this folder")
    arguments = parser.parse_args()
    codes = []
    for part, folder in PARTS.items():
        print(f"== {part}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{part}", "--data", str(arguments.data / folder)]
        command += ["--limit", str(arguments.limit)] if arguments.limit else []
        command += ["--out", str(arguments.out / f"{part}.json")] if arguments.out else []
        codes.append(subprocess.run(command, check=False).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    raise SystemExit(main())
