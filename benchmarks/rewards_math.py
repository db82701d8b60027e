"""The math reward on published answers, and where it and plain math-verify disagree.

    python -m benchmarks.rewards_math --data FOLDER [--limit N] [--out FILE.json]

FOLDER holds gsm8k_train.jsonl and math_train.json as published. Every answer is held against itself, which must be accepted,
against the answer of another problem, and against itself with one digit changed, which must be rejected. A pair that is accepted
although the texts differ is listed: "7 hours" and "7" are one answer under the default policy. math-verify runs as it comes, with
its time-outs.

Exit code 1: an answer does not agree with itself, or this package's reader is slower than `LEAST_PAIRS_PER_SECOND`, by CPU time.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import math_verify

from benchmarks import measure
from megatron_r1.errors import DataError
from megatron_r1.rewards.math.scorer import answers_agree, clean_answer, reference_answer

Pair = tuple[str, str]  #: answer, reference
LEAST_PAIRS_PER_SECOND = {"plain numbers": 5_000, "the rest": 300}
_PLAIN = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


@dataclass
class Result:
    """One kind of pair of one source."""

    source: str
    kind: str  #: itself, another's or one digit off
    pairs: int = 0
    accepted: int = 0
    seconds: float = 0.0  #: CPU of ours
    by_form: dict[str, tuple[int, float]] = field(default_factory=dict)  #: plain numbers, the rest: pairs and seconds of ours
    peer_accepted: int = 0
    peer_seconds: float = 0.0
    surprises: list[Pair] = field(default_factory=list)  #: ours: rejected itself, or accepted something else
    disagreements: list[tuple[str, str, bool]] = field(default_factory=list)  #: answer, reference, whether ours accepts


def main() -> int:
    """Returns the exit code."""
    parser = measure.parser_of(__doc__.splitlines()[0], repeats=1)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k_train.jsonl and math_train.json")
    parser.add_argument("--limit", type=measure.positive, help="problems of each source; default: all")
    return measure.run(compare, parser.parse_args())


def compare(arguments: argparse.Namespace) -> None:
    """Run both over all pairs, print the counts, list what is unexpected."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    results = []
    for source, answers in (("GSM8K", read_gsm8k(arguments.data)), ("MATH", read_math(arguments.data))):
        answers = answers[: arguments.limit]
        for kind, pairs in pairs_of(answers, arguments.seed).items():
            results.append(judge(source, kind, pairs))
    rows = [
        [f"{r.source}, {r.kind}", f"{r.pairs:,}", f"{r.accepted:,}", f"{r.peer_accepted:,}", f"{len(r.disagreements):,}",
         f"{r.pairs / r.seconds:,.0f}", f"{r.pairs / r.peer_seconds:,.0f}"]
        for r in results
    ]  # fmt: skip
    header = ["pairs", "number", "accepted", "math-verify accepts", "disagree", "pairs/s", "math-verify, pairs/s"]
    measure.print_table(header, rows)
    for result in results:
        for answer, reference in result.surprises:
            print(
                f"{result.source}, {result.kind}: {'rejected' if result.kind == 'itself' else 'accepted'} {answer!r} "
                f"for {reference!r}"
            )
    disagreements = [(r.source, r.kind, *pair) for r in results for pair in r.disagreements]
    if arguments.out is None:
        for source, kind, answer, reference, ours in disagreements:
            print(f"disagree: {source}, {kind}: only {'ours' if ours else 'math-verify'} accepts {answer!r} for {reference!r}")
    else:
        found = {"rewards_math": [asdict(result) for result in results]}
        measure.write_results(arguments.out, argparse.Namespace(**vars(arguments) | {"data": str(arguments.data)}), found,
                              measure.describe_machine("cpu"))  # fmt: skip
        print(f"{len(disagreements):,} disagreements are listed in {arguments.out}")
    check(results)


def judge(source: str, kind: str, pairs: list[Pair]) -> Result:
    """Hold each pair against both."""
    result = Result(source, kind, pairs=len(pairs))
    ours, forms = [], [form_of(pair) for pair in pairs]
    seconds = dict.fromkeys(LEAST_PAIRS_PER_SECOND, 0.0)
    for pair, form in zip(pairs, forms, strict=True):
        start = time.process_time()
        ours.append(answers_agree(*pair))
        seconds[form] += time.process_time() - start
    result.by_form = {form: (forms.count(form), seconds[form]) for form in seconds}
    result.seconds = sum(seconds.values())
    start = time.process_time()
    peers = [peer_agrees(*pair) for pair in pairs]
    result.peer_seconds = time.process_time() - start
    result.accepted, result.peer_accepted = sum(ours), sum(peers)
    result.surprises = [pair for pair, accepted in zip(pairs, ours, strict=True) if accepted != (kind == "itself")]
    result.disagreements = [(*pair, own) for pair, own, peer in zip(pairs, ours, peers, strict=True) if own != peer]
    return result


def form_of(pair: Pair) -> str:
    """Whether both sides are plain numbers."""
    return "plain numbers" if all(_PLAIN.fullmatch(text) for text in pair) else "the rest"


def check(results: list[Result]) -> None:
    """Print the speed on plain numbers and on the rest.

    Raises:
        Disagreement: it is too low, or an answer does not agree with itself.
    """
    for form, least in LEAST_PAIRS_PER_SECOND.items():
        pairs, seconds = (sum(column) for column in zip(*(result.by_form[form] for result in results), strict=True))
        if pairs:
            print(f"{form}: {pairs:,} pairs, {pairs / seconds:,.0f} pairs/s of CPU time; at least {least:,} are required")
            if pairs / seconds < least:
                raise measure.Disagreement(f"{form}: {pairs / seconds:,.0f} pairs/s are fewer than {least:,}")
    rejected = [pair for result in results if result.kind == "itself" for pair in result.surprises]
    if rejected:
        raise measure.Disagreement(f"{len(rejected)} answers do not agree with themselves, the first is {rejected[0][0]!r}")


def pairs_of(answers: list[str], seed: int) -> dict[str, list[Pair]]:
    """The pairs by kind; `another's` and `one digit off` leave out what is the same text after all."""
    shuffled = answers[:]
    random.Random(seed).shuffle(shuffled)
    kinds: dict[str, Callable[[], Iterator[Pair]]] = {
        "itself": lambda: zip(answers, answers, strict=True),
        "another's": lambda: ((a, b) for a, b in zip(shuffled, answers, strict=True) if clean_answer(a) != clean_answer(b)),
        "one digit off": lambda: ((changed, a) for a in answers if (changed := change_digit(a)) != a),
    }
    return {kind: list(make()) for kind, make in kinds.items()}


def change_digit(answer: str) -> str:
    """The answer with its last digit one higher, 9 becoming 0; itself where there is no digit."""
    for index in range(len(answer) - 1, -1, -1):
        if answer[index] in "0123456789":
            return answer[:index] + str((int(answer[index]) + 1) % 10) + answer[index + 1 :]
    return answer


def peer_agrees(answer: str, reference: str) -> bool:
    """Plain math-verify, each side as a formula in dollars."""
    return math_verify.verify(_peer_reads(reference), _peer_reads(answer))


@lru_cache(maxsize=100_000)
def _peer_reads(answer: str) -> list:
    return math_verify.parse(f"${answer}$")


def read_gsm8k(folder: Path) -> list[str]:
    """The final answers."""
    text = _read(folder / "gsm8k_train.jsonl")
    return [reference_answer(json.loads(line)["answer"]).strip() for line in text.splitlines() if line]


def read_math(folder: Path) -> list[str]:
    """The answers; a few problems have none."""
    return [answer for problem in json.loads(_read(folder / "math_train.json")) if (answer := problem["answer"])]


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} is missing: --data names the folder that holds it")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
