"""Problems with a reference answer, split into a training part and a held-out part that never meet."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.data import DataConfig
from megatron_r1.data.record_files import read_records, take_text
from megatron_r1.data.split import is_heldout
from megatron_r1.data.tally.arithmetic import TallyProblem, draw_problem
from megatron_r1.errors import DataError
from megatron_r1.types import DOMAINS, KINDS, PREFERENCES

_OTHER_DOMAIN = ", or name the scorer of this domain in reward.domains"


@dataclass(frozen=True)
class Problem:
    """A question and its reference answer."""

    id: str  #: stable over runs
    question: str
    answer: str  #: in the form that the reward function takes
    language: str = ""  #: "en", "zh", or "" if unknown
    domain: str = "math"  #: the subject, which names the scorer of accuracy; the answer of "code" is its tests as JSON
    kind: str = "reasoning"  #: "reasoning" or "general"
    preference: str = "helpful"  #: of a general problem: "helpful" or "safety"
    #: file and line; "" if the problem is of no file. Out of the text of a problem, since a cold start's digest is of that text
    where: str = field(default="", compare=False, repr=False)


class ProblemSource(Protocol):
    """Where prompts come from. Everything is a function of the seed and the position: there is no state to save."""

    fingerprint: str  #: changes when the problems change, or the name of their file
    content: str  #: changes when the problems change

    def train(self, position: int, seed: int) -> Problem:
        """The problem at this position of an endless stream of training problems."""

    def heldout(self, count: int, seed: int) -> list[Problem]:
        """`count` different held-out problems."""

    def fixed_problems(self) -> list[Problem]:
        """Every problem there can be, to check before a run; empty if problems are generated."""

    def domains(self) -> set[str]:
        """The domains of its reasoning problems."""


def load_problems(config: DataConfig, domains: Collection[str] = DOMAINS) -> ProblemSource:
    """The generated tally, or the problems of a file.

    Args:
        domains: those that have a scorer; a problem of another one is refused.

    Raises:
        DataError: a file that is missing, empty or malformed, with the line.
    """
    if config.source in ("tally", "tally_chat"):
        return TallyProblems(config.heldout_fraction)
    return FileProblems(read_problems(config, domains), config.heldout_fraction, config.source)


class TallyProblems:
    """Generated on demand; a problem may come again after a few thousand others."""

    def __init__(self, heldout_fraction: float):
        self._fraction = heldout_fraction
        self.fingerprint = self.content = f"tally-{heldout_fraction}"

    def train(self, position: int, seed: int) -> Problem:
        """See `ProblemSource`."""
        return _tally_problem(draw_problem(random.Random(f"tally {seed} {position}"), False, self._fraction))

    def heldout(self, count: int, seed: int) -> list[Problem]:
        """See `ProblemSource`; different in their numbers, not only in their language."""
        rng = random.Random(f"tally heldout {seed}")
        chosen: dict[str, TallyProblem] = {}
        while len(chosen) < count:
            problem = draw_problem(rng, True, self._fraction)
            chosen.setdefault(problem.expression, problem)
        return [_tally_problem(problem) for problem in chosen.values()]

    def fixed_problems(self) -> list[Problem]:
        """See `ProblemSource`."""
        return []

    def domains(self) -> set[str]:
        """See `ProblemSource`."""
        return {"math"}


def _tally_problem(problem: TallyProblem) -> Problem:
    return Problem(f"tally-{problem.language}-{problem.expression}", problem.question, str(problem.answer), problem.language)


class FileProblems:
    """A list of problems; every epoch visits every training problem once, in a new order."""

    def __init__(self, problems: list[Problem], heldout_fraction: float, name: str, kind: str = "reasoning"):
        """Args: `name` stands for the problems in messages; `kind` of those that are held out.

        Raises:
            DataError: one of the two parts is empty.
        """
        parts: dict[bool, list[Problem]] = {True: [], False: []}
        for problem in problems:
            parts[is_heldout(problem.question, heldout_fraction)].append(problem)
        self._name, self._train, self._heldout, self._kind = name, parts[False], parts[True], kind
        if not self._train:
            raise DataError(f"{name}: no training problem is left of {len(problems)} with data.heldout_fraction={heldout_fraction}")
        self.fingerprint = _print_of(f"{p.id}\t{p.question}\t{p.answer}" for p in self._train)
        self.content = _print_of(f"{p.question}\t{p.answer}" for p in self._train)

    def train(self, position: int, seed: int) -> Problem:
        """See `ProblemSource`."""
        epoch, offset = divmod(position, len(self._train))
        return self._train[shuffled(len(self._train), seed, epoch)[offset]]

    def heldout(self, count: int, seed: int) -> list[Problem]:
        """See `ProblemSource`; only reasoning problems if there are both kinds, because a general one has no accuracy.

        Raises:
            DataError: fewer held-out problems than asked for.
        """
        heldout = [problem for problem in self._heldout if problem.kind == self._kind]
        if count > len(heldout):
            raise DataError(
                f"{self._name}: evaluate.problems={count} but only {len(heldout)} problems are held out;"
                " ask for fewer or raise data.heldout_fraction"
            )
        return random.Random(f"heldout {seed}").sample(heldout, count)

    def fixed_problems(self) -> list[Problem]:
        """See `ProblemSource`."""
        return self._train + self._heldout

    def domains(self) -> set[str]:
        """See `ProblemSource`."""
        return {problem.domain for problem in self.fixed_problems() if problem.kind == "reasoning"}


def _print_of(lines: Iterable[str]) -> str:
    text = list(lines)
    return f"{len(text)}-{zlib.crc32(chr(10).join(text).encode()):08x}"


@lru_cache(maxsize=4)
def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    """The order of this epoch: a permutation of range(size)."""
    order = list(range(size))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


def read_problems(config: DataConfig, domains: Collection[str] = DOMAINS) -> list[Problem]:
    """The problems of `config.source`, a .jsonl file (one object a line) or a .json file (a list of objects).

    Args:
        domains: see `load_problems`.

    Raises:
        DataError: file and line of what is missing, malformed or there twice.
    """
    path = Path(config.source)
    problems, first_seen = [], {}
    for number, (where, record) in enumerate(read_records(path), start=1):
        problem = read_problem(record, config, domains, where, f"{path.stem}-{number}")
        if problem.question in first_seen:
            raise DataError(f"{where}: the same question stands at {first_seen[problem.question]}; remove one of the two")
        first_seen[problem.question] = where
        problems.append(problem)
    return problems


def read_problem(record: dict[str, Any], config: DataConfig, domains: Collection[str], where: str, id: str) -> Problem:
    """The problem of one record.

    Raises:
        DataError: what is missing or malformed, after `where`.
    """
    question = take_text(record, config.question_field, where)
    kind = _take_choice(record, "kind", KINDS, "reasoning", where)
    preference = _take_choice(record, "preference", PREFERENCES, "helpful", where)
    domain = _take_choice(record, "domain", domains, "code" if "tests" in record else "math", where, _OTHER_DOMAIN)
    language = take_text(record, "language", where) if record.get("language") else ""
    answer = _take_answer(record, config, kind, domain, where)
    return Problem(id, question, answer, language, domain, kind, preference, where)


def _take_choice(
    record: dict[str, Any], field: str, choices: Collection[str], default: str, where: str, otherwise: str = ""
) -> str:
    value = take_text(record, field, where) if field in record else default
    if value not in choices:
        raise DataError(f"{where}: {field} {value!r} is unknown; choose one of {', '.join(choices)}{otherwise}")
    return value


def _take_answer(record: dict[str, Any], config: DataConfig, kind: str, domain: str, where: str) -> str:
    """The reference as text: tests, and the objects and lists of further domains, as JSON. A general problem may have none."""
    if kind == "general":
        return take_text(record, config.answer_field, where) if record.get(config.answer_field) else ""
    if domain == "code" or (domain not in DOMAINS and "tests" in record):
        if not record.get("tests"):
            raise DataError(f"{where}: a problem of domain {domain} needs the field 'tests'")
        return json.dumps(record["tests"])
    if domain not in DOMAINS and isinstance(record.get(config.answer_field), (dict, list)):
        return json.dumps(record[config.answer_field])
    answer = take_text(record, config.answer_field, where)
    return _gsm8k_answer(answer, where) if config.answer_format == "gsm8k" else answer


def _gsm8k_answer(solution: str, where: str) -> str:
    _, marker, answer = solution.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not marker or not answer:
        raise DataError(f"{where}: data.answer_format=gsm8k needs '#### ANSWER' at the end of the answer")
    return answer
