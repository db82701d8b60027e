"""Feed bad inputs to every command: `python -m tests.fuzz --count 20000 --seed 7 [--target settings] [--keep FOLDER]`.

Each case runs in a forked child, so that a crash, a hang or a state left behind concerns that case alone. Prints one line for each
finding, with what repeats it, and ends with 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.runner import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="cases over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--only", type=int, help="only the case with this number, with its output shown")
    parser.add_argument(
        "--lines", type=Path, metavar="FILE", help="gets a line for each case: target, number, how it ended, what was said"
    )
    arguments = parser.parse_args()
    findings = fuzz(arguments.count, arguments.seed, arguments.target, arguments.only, arguments.lines)
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
