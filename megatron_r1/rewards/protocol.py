"""What a reward is: a scorer takes one response and gives a verdict.

Scorers run in worker processes (`workers/pool.py`), which must start within milliseconds. A module that defines a scorer therefore
imports neither torch nor `megatron_r1.types` nor `megatron_r1.config`, except for annotations, under TYPE_CHECKING.
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
        ValueError: a scored outcome has no finite score, or another outcome has a score: a broken grader must not look like a 0.
    """

    score: float | None  #: before its weight, usually in [0, 1]; None if the outcome is not in `SCORED`
    #: correct, wrong: about the response. error, timeout: the grader failed. unscorable: the reference or the data cannot be used
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
    """Scores responses one at a time. A worker builds it from keyword settings that fit JSON, e.g. `answer_location="boxed"`.

    `score` is called in the main thread of its process, so signals work there. The pool measures the time of every call and kills a
    late worker with its whole process group. A child process in another group or session must ask the kernel to die with its parent
    (PR_SET_PDEATHSIG, `bwrap --die-with-parent`). An exception becomes the outcome "error". A RewardError from a scorer that has
    scored nothing yet means that it cannot work on this machine, and ends the run.
    """

    name: str  #: e.g. "math"

    def score(self, response: str, reference: Any) -> Verdict:
        """The verdict on one response. Only a custom reward gets responses that were cut at the length limit.

        Args:
            response: decoded, without end of sequence; any text at all, also megabytes of it or half a surrogate pair.
            reference: what the response is compared with. math: the answer, a str; choice: a letter; code: the tests, parsed from
                JSON; language: the target language, e.g. "en"; format: None; a custom reward: `custom.custom_reference`.

        A response that gives no answer, or that is malformed, is "wrong". A missing or unusable reference is "unscorable". A graded
        score (language) is "correct" from a threshold that the scorer documents.
        """


class Asked(Protocol):
    """What scoring knows of a problem: a `Problem` or a `Prompt`."""

    @property
    def id(self) -> str:
        """Stable over runs."""

    @property
    def question(self) -> str:
        """The bare question, before the template."""

    @property
    def answer(self) -> str:
        """The reference."""

    @property
    def domain(self) -> str:
        """The subject, which names the scorer of accuracy."""

    @property
    def kind(self) -> str:
        """ "reasoning" or "general"."""

    @property
    def language(self) -> str:
        """ "en", "zh", or "" if unknown."""


class ScoringService(Protocol):
    """Where scorers run: a `ScoringPool`."""

    def submit(self, scorer: str, response: str, reference: Any = None) -> Future[Verdict]:
        """Start scoring a response with the named scorer; returns at once."""


class Grader(Protocol):
    """A `Judge`."""

    def grade(self, question: str, reference: str, answer: str) -> Future[Verdict]:
        """Is the answer right?"""
