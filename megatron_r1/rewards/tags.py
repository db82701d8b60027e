"""Where the reasoning and the answer stand in a response."""

from __future__ import annotations

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

MAX_ANSWER_CHARACTERS = 1000  #: what is longer is not a final answer


def find_tagged_answer(response: str) -> str | None:
    """The text of the one <answer> element, which must come after the reasoning; None where there is no such thing.

    An answer inside the reasoning (before the last </think>, or after a <think> that is never closed) does not count, nor does
    any answer where two are offered.
    """
    if response.count(ANSWER_OPEN) != 1 or response.count(ANSWER_CLOSE) != 1:
        return None
    start, end = response.index(ANSWER_OPEN), response.index(ANSWER_CLOSE)
    if end < start or start < _end_of_reasoning(response):
        return None
    return _bounded(response[start + len(ANSWER_OPEN) : end])


def find_boxed_answer(response: str) -> str | None:
    r"""The content of the last \boxed{} after the reasoning; None where there is none, or its braces do not close."""
    start = response.rfind("\\boxed{")
    if start < _end_of_reasoning(response):  # also: not found
        return None
    start += len("\\boxed{")
    depth = 1
    for index in range(start, min(len(response), start + MAX_ANSWER_CHARACTERS + 1)):
        depth += {"{": 1, "}": -1}.get(response[index], 0)
        if depth == 0:
            return _bounded(response[start:index])
    return None


def _end_of_reasoning(response: str) -> int:
    """Index from which an answer counts; past the end where the reasoning never ends."""
    opened, closed = response.rfind(THINK_OPEN), response.rfind(THINK_CLOSE)
    if opened > closed:
        return len(response) + 1
    return max(closed, 0)


def _bounded(answer: str) -> str | None:
    return answer.strip() if len(answer) <= MAX_ANSWER_CHARACTERS else None
