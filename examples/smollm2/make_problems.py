"""Sums of two numbers as problems, and short solutions to some of them: what `make real-model` trains and measures on.

python examples/smollm2/make_problems.py --out runs/smollm2/data

    solutions.jsonl   conversations of a question and its solution, for the cold start
    train.jsonl       problems for reinforcement learning, none of them in solutions.jsonl
    heldout.jsonl     problems to measure on, in neither of the two

A sum and the one with its terms swapped are always in the same file. The same seed writes the same files.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from megatron_r1.curation.outputs import write_json_lines

COUNTS = {"solutions": 256, "train": 1024, "heldout": 256}
SMALLEST, LARGEST = 10, 99  #: terms
EXAMPLE = (17, 21)  #: the sum that the system message of sums.yaml shows; it is no problem


def make_problems(seed: int) -> dict[str, list[tuple[int, int]]]:
    """The terms of every problem, by file. No two problems have the same two terms, in whichever order."""
    rng = random.Random(f"sums {seed}")
    pairs = [(first, second) for first in range(SMALLEST, LARGEST + 1) for second in range(first, LARGEST + 1)]
    pairs.remove(EXAMPLE)
    drawn = iter(rng.sample(pairs, sum(COUNTS.values())))
    return {name: [tuple(rng.sample(next(drawn), 2)) for _ in range(number)] for name, number in COUNTS.items()}


def question(first: int, second: int) -> str:
    """What is asked."""
    return f"What is {first} + {second}?"


def solution(first: int, second: int) -> str:
    """The reply that the cold start teaches: a sentence of mathematics with the answer in a box."""
    return f"{first} + {second} = \\boxed{{{first + second}}}"


def write_files(folder: Path, seed: int) -> None:
    """Write the three files; each is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in make_problems(seed).items():
        if name == "solutions":
            records = [{"prompt": question(*terms), "response": solution(*terms)} for terms in problems]
        else:
            records = [{"id": f"{a}+{b}", "question": question(a, b), "answer": str(a + b)} for a, b in problems]
        write_json_lines(folder / f"{name}.jsonl", records)


def main(argv: list[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    write_files(arguments.out, arguments.seed)
    print(f"{arguments.out}: " + ", ".join(f"{number} {name}" for name, number in COUNTS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
