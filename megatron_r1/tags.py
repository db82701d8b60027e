"""Where the reasoning and the answer stand in a response. Every search is linear in the length of the response."""

from __future__ import annotations

import re
from typing import Literal, get_args

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

MAX_ANSWER_CHARACTERS = 1000  #: a longer text is no final answer
MAX_ANSWERS = 16  #: a response with more is no answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")

AnswerPlace = Literal["answer_tag", "boxed", "hash"]


def find_answers(response: str, place: AnswerPlace) -> list[str]:
    """The answers in the required place, first to last; none if one of them is malformed.

    Raises:
        ValueError: unknown place.
    """
    if place == "answer_tag":
        answer = find_tagged_answer(response)
        return [] if answer is None else [answer]
    if place == "boxed":
        return find_boxed_answers(response)
    if place == "hash":
        return find_hash_answers(response)
    raise ValueError(f"answer_location is {place!r}, expected one of {', '.join(get_args(AnswerPlace))}")


def find_tagged_answer(response: str) -> str | None:
    """The text of the one <answer> element, which must come after the reasoning; None if there is no such element.

    An answer inside the reasoning (before the last </think>, or after a <think> that is never closed) does not count, nor does
    any answer if there are two.
    """
    if response.count(ANSWER_OPEN) != 1 or response.count(ANSWER_CLOSE) != 1:
        return None
    start, end = response.index(ANSWER_OPEN), response.index(ANSWER_CLOSE)
    if end < start or start < _end_of_reasoning(response):
        return None
    return _bounded(response[start + len(ANSWER_OPEN) : end])


def find_boxed_answers(response: str) -> list[str]:
    r"""The content of every \boxed{} or \fbox{} after the reasoning; nothing if one does not close, or if there are too many."""
    answers: list[str] = []
    found = _BOX.search(response, _end_of_reasoning(response))
    while found:
        end = _closing_brace(response, found.end())
        if end is None or len(answers) == MAX_ANSWERS:
            return []
        answers.append(response[found.end() : end].strip())
        found = _BOX.search(response, end)
    return answers


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{} of a text; None if there is none, or if it does not close or holds nothing."""
    found = None
    for found in _BOX.finditer(text):
        pass
    end = _closing_brace(text, found.end()) if found else None
    return None if found is None or end is None else text[found.end() : end].strip() or None


def find_hash_answers(response: str) -> list[str]:
    """What follows each #### after the reasoning on its line, as in GSM8K; nothing if one is too long, or if there are too many."""
    answers: list[str] = []
    at = response.find("####", _end_of_reasoning(response))
    while at >= 0:
        end = response.find("\n", at)
        answer = _bounded(response[at + 4 : end if end >= 0 else len(response)])
        if answer is None or len(answers) == MAX_ANSWERS:
            return []
        answers.append(answer)
        at = response.find("####", end) if end >= 0 else -1
    return answers


def opening_of(prompt_text: str) -> str:
    """What a prompt already holds of its response: the <think> that it ends with, or nothing."""
    return f"{THINK_OPEN}\n" if prompt_text.rstrip().endswith(THINK_OPEN) else ""


def whole_response(prompt_text: str, response: str) -> str:
    """A response with the <think> that its prompt may hold. Without it, reasoning that never ends would pass for a summary."""
    return opening_of(prompt_text) + response


def find_summary(response: str) -> str | None:
    """What follows the reasoning, or all if there is none. None if the reasoning does not end or nothing follows it."""
    _, closed, summary = response.rpartition(THINK_CLOSE)
    if THINK_OPEN in summary or (THINK_OPEN in response and not closed):
        return None
    return summary.strip() or None


def without_reasoning(answer: str) -> str:
    """What a model says after its reasoning. The first </think> ends the reasoning; a later one is a quotation."""
    answer = answer.strip()
    return answer.partition(THINK_CLOSE)[2].strip() if answer.startswith(THINK_OPEN) else answer


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for index in range(start, min(len(text), start + MAX_ANSWER_CHARACTERS + 1)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def _end_of_reasoning(response: str) -> int:
    """Index from which an answer counts; past the end if the reasoning never ends."""
    opened, closed = response.rfind(THINK_OPEN), response.rfind(THINK_CLOSE)
    if opened > closed:
        return len(response) + 1
    return max(closed, 0)


def _bounded(answer: str) -> str | None:
    return answer.strip() if len(answer) <= MAX_ANSWER_CHARACTERS else None
