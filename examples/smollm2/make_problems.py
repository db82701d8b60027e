"""Arithmetic with two small numbers as problems, and short solutions to some: what `make real-model` trains and measures on.

python examples/smollm2/make_problems.py --out runs/smollm2/data

    solutions.jsonl   conversations of a question and its solution, for the cold start
    train.jsonl       problems for reinforcement learning, none of them in solutions.jsonl
    heldout.jsonl     problems to measure on, in neither of the two

A problem stands there once, with its terms in either order. The same seed writes the same files.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import random
import sys
from pathlib import Path

from megatron_r1.curation.outputs import write_json_lines

COUNTS = {"solutions": 192, "train": 180, "heldout": 100}
LARGEST = 20  #: number in a sum or a difference; a product has a factor of one digit
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

Terms = tuple[int, str, int]  #: a number, an operation, a number


def make_problems(seed: int) -> dict[str, list[Terms]]:
    """The problems of every file. None is that of another one, or its terms swapped."""
    rng = random.Random(f"arithmetic {seed}")
    numbers = range(2, LARGEST + 1)
    pool: list[Terms] = [(a, "+", b) for a in numbers for b in numbers if a <= b]
    pool += [(a, "-", b) for a in numbers for b in numbers if a > b and a - b != b]  # no question holds its answer
    pool += [(a, "*", b) for a in numbers for b in numbers if a <= b and a < 10]
    rng.shuffle(pool)
    swapped = [(b, sign, a) if sign != "-" and rng.random() < 0.5 else (a, sign, b) for a, sign, b in pool]
    ends = list(itertools.accumulate(COUNTS.values()))
    return {name: swapped[end - number : end] for (name, number), end in zip(COUNTS.items(), ends, strict=True)}


def result(terms: Terms) -> int:
    """The answer."""
    first, sign, second = terms
    return OPERATIONS[sign](first, second)


def question(terms: Terms) -> str:
    """What is asked."""
    return "What is {} {} {}?".format(*terms)


def solution(terms: Terms) -> str:
    """The reply that the cold start teaches: an equation with the answer in a box."""
    return "{} {} {} = \\boxed{{{}}}".format(*terms, result(terms))


def write_files(folder: Path, seed: int) -> None:
    """Write the three files; each is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in make_problems(seed).items():
        if name == "solutions":
            records = [{"prompt": question(terms), "response": solution(terms)} for terms in problems]
        else:
            records = [
                {"id": "{}{}{}".format(*terms), "question": question(terms), "answer": str(result(terms))} for terms in problems
            ]
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
