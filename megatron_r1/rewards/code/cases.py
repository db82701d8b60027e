"""The tests of a coding problem, in which expected values are kept apart from what enters the sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class TestsError(ValueError):
    """The tests are missing or cannot be used. The data is at fault, not the program."""


@dataclass(frozen=True)
class StdioTest:
    """A program reads `stdin` and must print `stdout`."""

    stdin: bytes
    stdout: bytes | None  #: None: only the problem's checker knows


@dataclass(frozen=True)
class CallTest:
    """An expression, evaluated in the program's namespace, must have a value."""

    expression: str  #: Python; with `arguments`, it gives the function to call
    expected: Any
    setup: str = ""  #: Python that runs after the program, before the expression
    arguments: tuple[Any, Any] | None = None  #: encoded positional and named ones
    strict: bool = True  #: see `compare.agrees`
    truth_only: bool = False  #: `expected` is the truth that the value must have


@dataclass(frozen=True)
class CheckTest:
    """Code that calls the candidate and decides for itself. It runs in a sandbox of its own; the program sees only the calls."""

    source: str
    prelude: str  #: Python that `source` needs
    candidate_names: tuple[str, ...]  #: under which `source` calls the candidate
    function: str  #: expression that gives the candidate in the program's namespace


Test = StdioTest | CallTest | CheckTest


@dataclass(frozen=True)
class Suite:
    """All tests of one problem."""

    tests: tuple[Test, ...]
    #: what the tests may mean as well if the data leaves it open, see `forms`. A program must pass all tests in one reading
    other_readings: tuple[tuple[Test, ...], ...] = ()
    prelude: str = ""  #: Python that stands before the program; from us
    before: str = ""  #: likewise, from the problem: it runs only where the program runs
    limits: Mapping[str, float] = field(default_factory=dict)  #: that the problem asks for, by the names of `limits.ProblemLimits`
    checker: str = ""  #: Python that decides whether a result is right, see `checker`; "": the result must be the expected one
    prompt: str = ""  #: Python text that begins `function`; an answer may be its body alone
    function: str = ""
    modules: Mapping[str, bytes] = field(default_factory=dict)  #: that it may import, see `supervisor.Program`

    @property
    def is_stdio(self) -> bool:
        """Whether the tests are of a program, not of a function."""
        return isinstance(self.tests[0], StdioTest)
