"""Format reward: did the response keep to its template?

The paper states that the format is rewarded (R1 v2 (arXiv) section 2.2), but neither the value nor the exact check.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.rules.visible import has_visible
from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

FormatName = Literal["zero", "chat", "chat_opened"]


class FormatScorer:
    """1 if the response has the format, else 0.

    Settings: `template`. "zero": one <think> and one <answer> element (R1 v2 table 1). "chat": the R1 chat format. "chat_opened":
    the same if the prompt already ended in "<think>\\n".
    """

    name = "format"

    def __init__(self, template: FormatName = "zero"):
        if template not in _CHECKS:
            raise ValueError(f"template is {template!r}, expected one of {', '.join(get_args(FormatName))}")
        self._follows = _CHECKS[template]

    def score(self, response: str, reference: Any = None) -> Verdict:
        """See `Scorer`; there is no reference."""
        if self._follows(response):
            return Verdict(1.0, "correct")
        return Verdict(0.0, "wrong", "not the format of the template")


def follows_format(response: str) -> bool:
    """Whether a response is one <think> element and then one <answer> element.

    Nothing but whitespace stands outside the two, both hold something that can be seen, and no tag stands inside them.
    """
    if any(response.count(tag) != 1 for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)):
        return False
    before, _, rest = response.partition(THINK_OPEN)
    reasoning, _, rest = rest.partition(THINK_CLOSE)
    between, _, rest = rest.partition(ANSWER_OPEN)
    answer, closing, after = rest.partition(ANSWER_CLOSE)
    in_order = bool(closing)  # if a tag comes too early, the later partitions find nothing
    outside_is_blank = not (before + between + after).strip()
    return in_order and outside_is_blank and has_visible(reasoning) and has_visible(answer)


def follows_chat_format(response: str, opened: bool = False) -> bool:
    r"""Whether a response is "<think>\n{reasoning}\n</think>\n\n{summary}", both with something to see.

    This is the text that R1 trains on (docs/paper_facts.md, "Tokenizer and chat template").
    The line breaks are exact, since the model is to write what its chat template cuts; more blank lines belong to the parts, and
    space may end the response. Neither part holds a think tag.

    Args:
        response: decoded, without end of sequence.
        opened: the prompt ended in "<think>\n", so the response begins with the reasoning.
    """
    opening, closing = THINK_OPEN + "\n", "\n" + THINK_CLOSE + "\n\n"
    if not opened:
        if not response.startswith(opening):
            return False
        response = response[len(opening) :]
    reasoning, found, summary = response.partition(closing)
    if not found or any(tag in part for tag in (THINK_OPEN, THINK_CLOSE) for part in (reasoning, summary)):
        return False
    return has_visible(reasoning) and has_visible(summary)


_CHECKS = {
    "zero": follows_format,
    "chat": follows_chat_format,
    "chat_opened": lambda response: follows_chat_format(response, opened=True),
}
