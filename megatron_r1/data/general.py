"""General prompts, which have no right answer, and how a run mixes them with reasoning prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from megatron_r1.config.data import DataConfig
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.problems import FileProblems, ProblemSource, read_problem_file, require_heldout
from megatron_r1.data.tally.requests import Request, draw_request
from megatron_r1.errors import DataError


def load_general(config: DataConfig) -> ProblemSource | None:
    """The requests of `data.general_source`; None if it is not set.

    Raises:
        DataError: a file that is missing or malformed, with the line, or that holds a reasoning problem.
    """
    if config.general_source is None:
        return None
    if config.general_source == "tally_chat":
        return Requests(config.heldout_fraction)
    problems, notes = read_problem_file(config.model_copy(update={"source": config.general_source}))
    for problem in problems:
        if problem.kind != "general":
            raise DataError(f"{config.general_source}: problem {problem.id} is not of kind general: put it into data.source")
    return FileProblems(problems, config.heldout_fraction, config.general_source, "general", notes)


class Requests:
    """The requests of the generated world; see `tally.requests`."""

    def __init__(self, heldout_fraction: float):
        self._fraction = heldout_fraction
        self.fingerprint = self.content = f"requests-{heldout_fraction}"
        self.notes: Sequence[str] = ()

    def train(self, position: int, seed: int) -> Problem:
        """See `ProblemSource`."""
        return _to_problem(draw_request(random.Random(f"request {seed} {position}"), False, self._fraction))

    def heldout(self, count: int, seed: int) -> list[Problem]:
        """See `ProblemSource`; a question may come twice, since there are few."""
        require_heldout(count, self._fraction)
        rng = random.Random(f"request heldout {seed}")
        return [_to_problem(draw_request(rng, True, self._fraction), f"heldout-{number}-") for number in range(count)]

    def fixed_problems(self) -> list[Problem]:
        """See `ProblemSource`."""
        return []

    def domains(self) -> set[str]:
        """See `ProblemSource`: no rule scores a request."""
        return set()

    def select(self, keep: Callable[[Problem], bool], why: str) -> ProblemSource:
        """See `ProblemSource`."""
        return self


class GeneralMix:
    """Reasoning problems, and from a position on general ones among them.

    The kind of a position depends on the seed and the position alone. Source: R1 v2 (arXiv) section 3.2.2, which has general
    prompts only in the last 400 of 1,700 steps.

    Args:
        first_position: position of the stream from which general problems come.
        share: of general problems from there on.
    """

    def __init__(self, reasoning: ProblemSource, general: ProblemSource, first_position: int, share: float):
        self._reasoning, self._general = reasoning, general
        self._first_position, self._share = first_position, share
        self.fingerprint = f"{reasoning.fingerprint}+{general.fingerprint}-{first_position}-{share}"
        self.content = f"{reasoning.content}+{general.content}-{first_position}-{share}"
        self.notes: Sequence[str] = (*reasoning.notes, *general.notes)

    def train(self, position: int, seed: int) -> Problem:
        """See `ProblemSource`."""
        draw = random.Random(f"kind {seed} {position}").random()
        source = self._general if position >= self._first_position and draw < self._share else self._reasoning
        return source.train(position, seed)

    def heldout(self, count: int, seed: int) -> list[Problem]:
        """See `ProblemSource`; of the reasoning problems."""
        return self._reasoning.heldout(count, seed)

    def fixed_problems(self) -> list[Problem]:
        """See `ProblemSource`."""
        return self._reasoning.fixed_problems() + self._general.fixed_problems()

    def domains(self) -> set[str]:
        """See `ProblemSource`."""
        return self._reasoning.domains() | self._general.domains()

    def select(self, keep: Callable[[Problem], bool], why: str) -> ProblemSource:
        """See `ProblemSource`."""
        parts = (source.select(keep, why) for source in (self._reasoning, self._general))
        return GeneralMix(*parts, self._first_position, self._share)


def _to_problem(request: Request, prefix: str = "") -> Problem:
    return Problem(
        f"request-{prefix}{request.language}-{request.question}", request.question, "", request.language, "general", "general",
        request.preference,
    )  # fmt: skip
