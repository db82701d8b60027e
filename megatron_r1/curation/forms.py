r"""How an assistant's answer holds its reasoning and its summary.

    think:          "<think>\n{reasoning}\n</think>\n\n{summary}"                    (R1 v2 listings 3 and 5 to 7)
    special_token:  "|special_token|{reasoning}|special_token|{summary}"            (R1 v1 section 2.3.1)

An answer without reasoning is its summary alone. Samples of a policy come in other forms too, see `read_sample`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1.config.curation import CurationConfig
from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

_TAGS = (THINK_OPEN, THINK_CLOSE)
_OPENING, _CLOSING = THINK_OPEN + "\n", "\n" + THINK_CLOSE + "\n\n"


class Answer(NamedTuple):
    """An assistant's answer in its parts."""

    reasoning: str | None  #: None if the answer has none
    summary: str


@dataclass(frozen=True)
class Form:
    """Joins and splits answers. Without `special_token` it is the form with think tags."""

    special_token: str | None = None

    @classmethod
    def of(cls, config: CurationConfig) -> Form:
        """The form that the config names."""
        return cls(config.special_token if config.form == "special_token" else None)

    def join(self, answer: Answer) -> str:
        """The content of an assistant's message."""
        if answer.reasoning is None:
            return answer.summary
        if self.special_token is None:
            return _OPENING + answer.reasoning + _CLOSING + answer.summary
        return self.special_token + answer.reasoning + self.special_token + answer.summary

    def split(self, content: str) -> Answer | None:
        """The parts of a content; None if it is malformed: a blank part, a mark too many, or other line breaks than the form's."""
        marks = _TAGS if self.special_token is None else (self.special_token,)
        opening, closing = (_OPENING, _CLOSING) if self.special_token is None else (self.special_token, self.special_token)
        if not any(mark in content for mark in marks):
            return Answer(None, content) if content.strip() else None
        if not content.startswith(opening):
            return None
        reasoning, closed, summary = content[len(opening) :].partition(closing)
        if not closed or not reasoning.strip() or not summary.strip():
            return None
        return None if any(mark in part for mark in marks for part in (reasoning, summary)) else Answer(reasoning, summary)


def read_sample(response: str, answer_summary: str = "{answer}") -> Answer | None:
    """The parts of what a policy wrote, without the space around them; None if the response has none of these forms.

    R1-Zero's ("<think>..</think> <answer>..</answer>"), the chat format ("<think>..</think> summary"), and both without the first
    <think> if the prompt had opened it.

    Args:
        answer_summary: the summary made of an <answer> element; "{answer}" in it is what stands there.
    """
    before, opened, rest = response.partition(THINK_OPEN)
    if opened and before.strip():
        return None
    reasoning, closed, summary = (rest if opened else response).partition(THINK_CLOSE)
    if not closed or any(tag in part for tag in _TAGS for part in (reasoning, summary)):
        return None
    reasoning, summary = reasoning.strip(), summary.strip()
    if any(tag in reasoning for tag in (ANSWER_OPEN, ANSWER_CLOSE)):
        return None
    if ANSWER_OPEN in summary or ANSWER_CLOSE in summary:
        inside = summary.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
        if len(inside) != len(summary) - len(ANSWER_OPEN) - len(ANSWER_CLOSE) or ANSWER_OPEN in inside or ANSWER_CLOSE in inside:
            return None
        summary = answer_summary.replace("{answer}", inside.strip()) if inside.strip() else ""
    return Answer(reasoning, summary) if reasoning and summary else None
