"""Problems with a reference answer, split into a training part and a held-out part that never meet."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.data import DataConfig
from megatron_r1.data.problem_records import Problem, read_problem
from megatron_r1.data.record_files import read_records
from megatron_r1.data.split import is_heldout
from megatron_r1.data.tally.arithmetic import TallyProblem, count_heldout, draw_problem
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import DOMAINS


class ProblemSource(Protocol):
    """Where prompts come from. Everything is a function of the seed and the position: there is no state to save."""

    fingerprint: str  #: changes when the problems change, or the name of their file
    content: str  #: changes when the problems change
    notes: Sequence[str]  #: what was left out, one line each

    def train(self, position: int, seed: int) -> Problem:
        """The problem at this position of an endless stream of training problems."""

    def heldout(self, count: int, seed: int) -> list[Problem]:
        """`count` different held-out problems."""

    def fixed_problems(self) -> list[Problem]:
        """Every problem there can be, to check before a run; empty if problems are generated."""

    def domains(self) -> set[str]:
        """The domains of its reasoning problems."""

    def select(self, keep: Callable[[Problem], bool], why: str) -> ProblemSource:
        """The same without the problems of a file that `keep` does not want; `why` completes the note on them."""


def load_problems(config: DataConfig, domains: Collection[str] = DOMAINS) -> ProblemSource:
    """The generated tally, or the problems of a file.

    Args:
        domains: those that have a scorer; a problem of another one is refused.

    Raises:
        DataError: a file that is missing, empty or malformed, with the line.
        ConfigError: generated problems with a file to evaluate on.
    """
    if config.source in ("tally", "tally_chat"):
        if config.evaluation_source is not None:
            raise ConfigError(
                f"data.evaluation_source goes with a file in data.source, which is {config.source}: drop one of the two"
            )
        return TallyProblems(config.heldout_fraction)
    problems, notes = read_problem_file(config, domains)
    if config.evaluation_source is None:
        return FileProblems(problems, config.heldout_fraction, config.source, notes=notes)
    evaluated, more = read_problem_file(config.model_copy(update={"source": config.evaluation_source}), domains)
    held = {_asked(problem) for problem in evaluated}
    train = [problem for problem in problems if _asked(problem) not in held]
    if len(train) < len(problems):
        notes.append(f"{config.source}: {len(problems) - len(train):,} problems of data.evaluation_source are not trained on")
    return FileProblems(train, 0.0, config.source, notes=[*notes, *more], evaluated=evaluated)


_SUSPICIOUS = 20  # repeats, after which there may be too few problems


class TallyProblems:
    """Generated on demand; a problem may come again after a few thousand others."""

    def __init__(self, heldout_fraction: float):
        self._fraction = heldout_fraction
        self.fingerprint = self.content = f"tally-{heldout_fraction}"
        self.notes: Sequence[str] = ()

    def train(self, position: int, seed: int) -> Problem:
        """See `ProblemSource`."""
        return _tally_problem(draw_problem(random.Random(f"tally {seed} {position}"), False, self._fraction))

    def heldout(self, count: int, seed: int) -> list[Problem]:
        """See `ProblemSource`; different in their numbers, not only in their language."""
        require_heldout(count, self._fraction)
        rng = random.Random(f"tally heldout {seed}")
        chosen: dict[str, TallyProblem] = {}
        repeats = 0
        while len(chosen) < count:
            problem = draw_problem(rng, True, self._fraction)
            if problem.expression in chosen:
                repeats += 1
                if repeats == _SUSPICIOUS and count > (most := count_heldout(self._fraction)):
                    raise DataError(
                        f"evaluate.problems={count} but data.heldout_fraction={self._fraction} holds out only {most} generated "
                        "problems: ask for fewer, or hold out more"
                    )
            chosen.setdefault(problem.expression, problem)
        return [_tally_problem(problem) for problem in chosen.values()]

    def fixed_problems(self) -> list[Problem]:
        """See `ProblemSource`."""
        return []

    def domains(self) -> set[str]:
        """See `ProblemSource`."""
        return {"math"}

    def select(self, keep: Callable[[Problem], bool], why: str) -> ProblemSource:
        """See `ProblemSource`."""
        return self


def _tally_problem(problem: TallyProblem) -> Problem:
    return Problem(f"tally-{problem.language}-{problem.expression}", problem.question, str(problem.answer), problem.language)


class FileProblems:
    """A list of problems; every epoch visits every training problem once, in a new order."""

    def __init__(
        self,
        problems: list[Problem],
        heldout_fraction: float,
        name: str,
        kind: str = "reasoning",
        notes: Sequence[str] = (),
        evaluated: list[Problem] | None = None,
    ):
        """
        Args:
            problems: all of them.
            heldout_fraction: share of them that is held out.
            name: stands for the problems in messages.
            kind: of those that are held out.
            notes: what was left out before.
            evaluated: problems of another file that are held out too.

        Raises:
            DataError: there is no training problem.
        """
        parts: dict[bool, list[Problem]] = {True: [], False: []}
        for problem in problems:
            parts[is_heldout(problem.question, heldout_fraction)].append(problem)
        self._name, self._train, self._kind, self._fraction = name, parts[False], kind, heldout_fraction
        self._heldout = [*parts[True], *(evaluated or ())]
        self.notes: Sequence[str] = tuple(notes)
        if not self._train:
            raise DataError(
                f"{name}: no training problem is left of {len(problems)} with data.heldout_fraction={heldout_fraction}; set it to "
                "0, with a file in data.evaluation_source or with evaluate.problems=0"
            )
        self.fingerprint = _print_of(f"{p.id}\t{p.question}\t{p.answer}{p.context or ''}" for p in self._train)
        self.content = _print_of(f"{p.question}\t{p.answer}{p.context or ''}" for p in self._train)

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
                " ask for fewer (0: no evaluation), raise data.heldout_fraction or give a file in data.evaluation_source"
            )
        return random.Random(f"heldout {seed}").sample(heldout, count)

    def fixed_problems(self) -> list[Problem]:
        """See `ProblemSource`."""
        return self._train + self._heldout

    def domains(self) -> set[str]:
        """See `ProblemSource`."""
        return {problem.domain for problem in self.fixed_problems() if problem.kind == "reasoning"}

    def select(self, keep: Callable[[Problem], bool], why: str) -> ProblemSource:
        """See `ProblemSource`."""
        train, heldout = ([problem for problem in part if keep(problem)] for part in (self._train, self._heldout))
        left_out = len(self._train) + len(self._heldout) - len(train) - len(heldout)
        if not left_out:
            return self
        if not train:
            raise DataError(f"{self._name}: no training problem is left: {left_out:,} are {why}")
        note = f"{self._name}: {left_out:,} problems are {why}, and are left out"
        return FileProblems(train, 0.0, self._name, self._kind, [*self.notes, note], heldout)


def _print_of(lines: Iterable[str]) -> str:
    text = list(lines)
    return f"{len(text)}-{zlib.crc32(chr(10).join(text).encode()):08x}"


_NUMBERING = {"extra_info", "id", "index", "uuid"}  # fields in which two rows of one problem differ


@lru_cache(maxsize=4)
def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    """The order of this epoch: a permutation of range(size)."""
    order = list(range(size))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


def read_problems(config: DataConfig, domains: Collection[str] = DOMAINS) -> list[Problem]:
    """The problems of `read_problem_file`."""
    return read_problem_file(config, domains)[0]


def read_problem_file(config: DataConfig, domains: Collection[str] = DOMAINS) -> tuple[list[Problem], list[str]]:
    """The problems of `config.source`, each question once, and what was left out, one line each.

    What is kept in memory grows with the number of different questions, not with the file. A record that stands there again as it
    is costs no more than its reading, a quarter of what its parsing costs: DAPO-Math-17k has 1.8 million rows.

    Args:
        config: its `repeated` says what happens to a question that comes again.
        domains: see `load_problems`.

    Raises:
        DataError: file and line of what is missing, malformed or there twice; nothing is left.
    """
    path = Path(config.source)
    found: dict[Any, Problem] = {}
    contradicting: dict[Any, str] = {}
    number = repeats = 0
    seen: set[bytes] = set()
    named = {name.partition(".")[0] for name in (config.question_field, config.answer_field)}
    passed_over = _NUMBERING - named
    for number, (where, record) in enumerate(read_records(path), start=1):
        same = hashlib.blake2b(
            repr([item for item in record.items() if item[0] not in passed_over]).encode("utf-8", "surrogatepass"), digest_size=16
        ).digest()
        if same in seen and config.repeated == "drop":
            repeats += 1
            continue
        problem = read_problem(record, config, domains, where, f"{path.stem}-{number}")
        first = found.setdefault(_asked(problem), problem)
        if len(seen) <= 4 * len(found):  # where every row has something of its own, none is found again
            seen.add(same)
        if first is problem:
            continue
        if config.repeated == "error":
            raise DataError(f"{where}: the same question stands at {first.where}; remove one of the two")
        repeats += 1
        if first.answer != problem.answer:
            contradicting.setdefault(_asked(problem), f"{first.where} and {where}")
    notes = []
    if repeats:
        notes.append(f"{path}: {len(found):,} different problems of {number:,}: {repeats:,} repeat a question, which counts once")
    if contradicting:
        notes.append(
            f"{path}: {len(contradicting):,} questions have answers that differ, and are left out, the first at "
            f"{next(iter(contradicting.values()))}"
        )
    problems = [problem for asked, problem in found.items() if asked not in contradicting]
    if not problems:
        raise DataError(f"{notes[-1]}; nothing is left")
    return problems, notes


def require_heldout(count: int, fraction: float) -> None:
    """Raises DataError for held-out problems of a generated world none of which is held out."""
    if count and not fraction:
        raise DataError("data.heldout_fraction=0 holds out no problem: raise it, or set evaluate.problems=0")


def _asked(problem: Problem) -> Any:
    """What makes two problems the same."""
    return (problem.context, problem.question) if problem.context else problem.question
