"""Is the reference of a problem one that its scorer can use? And which language is a question in?

Scorers in form only, so that they run in worker processes with their limits. Neither needs a sandbox: no program is run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_r1.rewards.code.cases import CallTest, CheckTest, StdioTest, Suite, TestsError
from megatron_r1.rewards.code.forms import read_tests
from megatron_r1.rewards.language.scorer import LANGUAGES, count_words
from megatron_r1.rewards.math.scorer import MathScorer, reference_answer
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.rules.choice import ChoiceScorer
from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, AnswerPlace

_MIN_WORDS = 8  #: of a question whose language is found


class ReferenceChecker:
    """Scores a reference against itself; tests are read and compared with each other.

    `score` takes the name of a scorer, "math", "choice" or "code", as the response. "correct": the reference can be used;
    "wrong": it does not agree with itself, or its tests contradict each other; "unscorable": the scorer cannot read it.

    Settings: those of `MathScorer`.
    """

    name = "references"

    def __init__(self, answer_location: AnswerPlace, policy: Mapping[str, Any]) -> None:
        self._place = answer_location
        self._math, self._choice = MathScorer(answer_location, policy), ChoiceScorer()

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`."""
        if response == "code":
            return _check_tests(reference)
        if response == "choice":
            return self._choice.score(f"ANSWER: {reference}", reference)
        answer = reference_answer(reference) if isinstance(reference, str) else ""
        verdict = self._math.score(_in_place(answer.strip(), self._place), reference)
        if verdict.outcome == "wrong":
            return Verdict(0.0, "wrong", f"{_short(answer)} does not agree with itself")
        return verdict if verdict.outcome == "correct" else replace(verdict, detail=f"{verdict.detail}: {_short(answer)}")


class QuestionLanguage:
    """Finds the language of most words of a question: `parts["language"]`, "" if there are too few words."""

    name = "question_language"

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`; there is no reference."""
        words = count_words(response)
        language, count = max(((name, words[name]) for name in LANGUAGES), key=lambda pair: pair[1])
        found = language if words.total() >= _MIN_WORDS and count > words.total() / 2 else ""
        return Verdict(1.0, "correct", parts={"language": found})


def _in_place(answer: str, place: AnswerPlace) -> str:
    """A response that gives this answer."""
    if place == "boxed":
        return f"\\boxed{{{answer}}}"
    return f"#### {' '.join(answer.split())}" if place == "hash" else f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def _check_tests(reference: Any) -> Verdict:
    try:
        suite = read_tests(reference)
    except TestsError as error:
        return Verdict(None, "unscorable", str(error))
    if any(isinstance(test, CheckTest) and not _can_check(test) for test in suite.tests):
        return Verdict(None, "unscorable", "a check never uses the program, or asserts nothing")
    contradiction = find_contradiction(suite)
    if contradiction is not None:
        first, second = contradiction
        return Verdict(0.0, "wrong", f"tests {first + 1} and {second + 1} have the same input and expect different results")
    return Verdict(1.0, "correct")


def _can_check(test: CheckTest) -> bool:
    """Whether code that decides for itself names what it is to check, and can fail. Code that is no Python does not."""
    try:
        tree = ast.parse(test.source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    nodes = list(ast.walk(tree))
    names_it = any(isinstance(node, ast.Name) and node.id in test.candidate_names for node in nodes)
    can_fail = any(isinstance(node, (ast.Assert, ast.Raise)) for node in nodes)
    return names_it and (can_fail or any(isinstance(node, ast.Attribute) and node.attr.startswith("assert") for node in nodes))


def find_contradiction(suite: Suite) -> tuple[int, int] | None:
    """Two tests of the same input that expect different results, from 0; None if there are none, or a checker decides."""
    if suite.checker:
        return None
    seen: dict[str, tuple[int, str]] = {}
    for number, test in enumerate(suite.tests):
        if isinstance(test, StdioTest):
            given, expected = test.stdin.decode(errors="replace"), _words(test.stdout or b"")
        elif isinstance(test, CallTest):
            given = json.dumps([test.setup, test.expression, test.arguments, test.truth_only], default=repr)
            expected = repr(test.expected)
        else:
            continue
        first, before = seen.setdefault(given, (number, expected))
        if before != expected:
            return first, number
    return None


def _words(output: bytes) -> str:
    """An output whose space does not matter, as outputs are compared."""
    return " ".join(output.decode(errors="replace").split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
