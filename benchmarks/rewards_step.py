"""What scoring one step of GRPO costs at scale: the rates of this machine's cores, and what follows of them.

    python -m benchmarks.rewards_step [--answers 8192] [--tokens 32768] [--pools 8] [--workers 64]

CPU time is measured, so a busy machine gives the same figures. Scoring runs beside sampling; a step waits for what is left of it.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks.measure import positive
from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.language.scorer import LanguageScorer
from megatron_r1.rewards.math.scorer import MathScorer
from megatron_r1.rewards.rules.format import FormatScorer

CHARACTERS_A_TOKEN = 4  #: of English reasoning
SECOND_OPINION_SECONDS = 0.3  #: after which math-verify is cut off
_SENTENCES = "Let us think about {0}. The number {0} is even, so $x_{0} = {0}$ and we try the next case, which takes some care.\n"


@dataclass(frozen=True)
class Rates:
    """Of one core."""

    characters_per_second: float  #: language reward
    format_characters_per_second: float
    math_per_second: float  #: answers that the own reader can tell
    program_tests_per_second: float  #: runs of a short Python program; the sandbox's processes count


def step_seconds(
    rates: Rates,
    answers: int,
    tokens: int,
    workers: int,
    tests: int = 10,
    second_opinions: float = 0.1,
    problems: int = 0,
    pools: int = 1,
) -> dict[str, float]:
    """Seconds by the clock to score a step's answers, by component, and to check references at the start.

    Args:
        tokens: of each answer.
        workers: of each pool, with a core each.
        pools: one beside each engine, for what that engine samples: the same number of answers for engines of the same speed. Only
            rank 0's checks references.
        tests: of each program.
        second_opinions: share of the answers to mathematics that math-verify looks at, each for `SECOND_OPINION_SECONDS` at worst.
        problems: of the training file; grpo checks the reference of each when it starts.
    """
    characters = answers * tokens * CHARACTERS_A_TOKEN
    share = math.ceil(math.ceil(answers / pools) / workers) / answers  # of all work, what the busiest worker does: whole answers
    return {
        "language": characters / rates.characters_per_second * share,
        "format": characters / rates.format_characters_per_second * share,
        "math": answers * (1 / rates.math_per_second + second_opinions * SECOND_OPINION_SECONDS) * share,
        "code": answers * tests / rates.program_tests_per_second * share,
        "references at the start": problems * (1 / rates.math_per_second + second_opinions * SECOND_OPINION_SECONDS) / workers,
    }


def measure(tokens: int) -> Rates:
    """Rates of this machine, in some seconds."""
    length = tokens * CHARACTERS_A_TOKEN
    text = "".join(_SENTENCES.format(number) for number in range(length // len(_SENTENCES) + 1))[:length]
    response = f"<think>{text}</think>\n<answer>42</answer>"
    language, form, answer = LanguageScorer(), FormatScorer("zero"), MathScorer("answer_tag")
    language.score(response, "en")  # loads its lists of words
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    tests = {"inputs": ["1 2\n"] * 20, "outputs": ["3\n"] * 20}
    code = CodeScorer()
    return Rates(
        length / _cpu_seconds(lambda: language.score(response, "en")),
        length / _cpu_seconds(lambda: form.score(response), 20),
        1 / _cpu_seconds(lambda: answer.score("<answer>42</answer>", "43"), 200),
        20 / _cpu_seconds(lambda: code.score(program, tests)),
    )


def _cpu_seconds(action: Callable[[], object], times: int = 1) -> float:
    """CPU time of one call, with that of the processes that it starts and waits for."""

    def used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before = used()
    for _ in range(times):
        action()
    return (used() - before) / times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=positive, default=8192, help="responses of a step")
    parser.add_argument("--tokens", type=positive, default=32768, help="tokens of a response")
    parser.add_argument("--pools", type=positive, default=8, help="engines, each with scoring processes of its own")
    parser.add_argument("--workers", type=positive, default=64, help="processes of a pool (reward.workers), each with a core")
    parser.add_argument("--tests", type=positive, default=10, help="tests of a program")
    parser.add_argument("--problems", type=positive, default=50_000, help="problems whose references are checked at the start")
    arguments = parser.parse_args()
    started = time.monotonic()
    rates = measure(arguments.tokens)
    for name, rate in asdict(rates).items():
        print(f"{name.replace('_', ' ')}: {rate:,.0f}")
    seconds = step_seconds(
        rates,
        arguments.answers,
        arguments.tokens,
        arguments.workers,
        arguments.tests,
        problems=arguments.problems,
        pools=arguments.pools,
    )
    print(f"{arguments.answers:,} answers of {arguments.tokens:,} tokens on {arguments.pools} x {arguments.workers} workers take")
    for name, value in seconds.items():
        print(f"  {name}: {value:,.1f} s")
    print(f"measured in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
