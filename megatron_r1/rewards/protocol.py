"""What a reward is: a scorer judges one response and gives a verdict.

Scorers run in worker processes (`engine.py`), where a start must cost milliseconds: a module that defines one imports neither torch
nor `megatron_r1.types` nor `megatron_r1.config` (annotations may, under TYPE_CHECKING).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    from concurrent.futures import Future

Outcome = Literal["correct", "wrong", "error", "timeout", "unscorable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
SCORED: tuple[Outcome, ...] = ("correct", "wrong")  #: the outcomes that have a score


@dataclass(frozen=True)
class Verdict:
    """What became of one response. Picklable; every field fits JSON.

    Raises:
        ValueError: a scored outcome without a finite score, or a score beside another outcome: a broken grader must not look like a 0.
    """

    score: float | None  #: before its weight, usually in [0, 1]; None where the outcome is not in `SCORED`
    #: correct, wrong: the response's doing. error, timeout: the grader's. unscorable: the reference's or the data's
    outcome: Outcome
    detail: str = ""  #: one line for a person: why. Never holds a code test's expected output
    parts: Mapping[str, Any] | None = None  #: what the score is made of, e.g. every test's verdict

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"unknown outcome {self.outcome!r}, expected one of {', '.join(OUTCOMES)}")
        if (self.score is not None) != (self.outcome in SCORED):
            raise ValueError(f"outcome {self.outcome} with score {self.score}")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"outcome {self.outcome} with score {self.score}, expected a finite number")


class Scorer(Protocol):
    """Judges responses one at a time. Built in the worker from keyword settings that fit JSON: `MathScorer(answer_location="boxed")`.

    `score` is called in the main thread of its process, so signals work there. The engine counts time from the start of the work
    and ends a worker that is late with SIGKILL, its process group with it; a child in another group or session must ask the kernel
    to die with its parent (PR_SET_PDEATHSIG, `bwrap --die-with-parent`). An exception becomes the outcome "error"; a RewardError from
    a scorer that has judged nothing yet means that it cannot work on this machine, and ends the run.
    """

    name: str  #: "math", "code", "format", "language"

    def score(self, response: str, reference: Any) -> Verdict:
        """The verdict on one finished response. A response cut at the length limit never gets here.

        Args:
            response: decoded, without end of sequence; any text at all, also megabytes of it or half a surrogate pair.
            reference: what it is held against. math: the answer, a str; code: the tests, as parsed from JSON; language: the target
                language, e.g. "en"; format: None.

        A response that gives no answer, or that is malformed, is "wrong". A missing or unusable reference is "unscorable". A graded
        score (language) is "correct" from a threshold that the scorer documents.
        """


class Asked(Protocol):
    """A `Problem` or a `Prompt`."""

    id: str
    question: str
    answer: str  #: the reference
    domain: str
    kind: str
    language: str


class ScoringService(Protocol):
    """Where scorers run: a `ScoringPool`."""

    def submit(self, scorer: str, response: str, reference: Any = None) -> Future[Verdict]:
        """Start scoring a response with the named scorer; returns at once."""


class Grader(Protocol):
    """A `Judge`."""

    def grade(self, question: str, reference: str, answer: str) -> Future[Verdict]:
        """Is the answer right?"""
