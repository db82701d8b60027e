"""Format reward: did the response keep to its template?

The paper states that the format is rewarded (R1 v2 (arXiv) section 2.2), but neither the value nor the exact check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from megatron_r1.errors import RewardError, one_line
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.rules.visible import has_visible
from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

FormatName = Literal["zero", "chat", "custom"]


class FormatScorer:
    """1 if the response has the format, else 0. A response has the <think> that its prompt opened before it.

    Settings: `form`. "zero": one <think> and one <answer> element (R1 v2 table 1). "chat": the R1 chat format. "custom": the whole
    response matches `pattern`, a regular expression of RE2: its time is linear in the response, which nobody can be trusted with.

    Raises:
        RewardError: a pattern that RE2 does not take.
    """

    name = "format"

    def __init__(self, form: FormatName = "zero", pattern: str | None = None):
        if form not in get_args(FormatName):
            raise ValueError(f"form is {form!r}, expected one of {', '.join(get_args(FormatName))}")
        self._follows = _CHECKS[form] if pattern is None else whole_match(pattern)

    def score(self, response: str, reference: Any = None) -> Verdict:
        """See `Scorer`; there is no reference."""
        if self._follows(response):
            return Verdict(1.0, "correct")
        return Verdict(0.0, "wrong", "not the format that is rewarded")


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


def follows_chat_format(response: str) -> bool:
    r"""Whether a response is "<think>\n{reasoning}\n</think>\n\n{summary}", both with something to see.

    This is the text that R1 trains on (docs/paper_facts.md, "Tokenizer and chat template").
    The line breaks are exact, since the model is to write what its chat template cuts; more blank lines belong to the parts, and
    space may end the response. Neither part holds a think tag.

    Args:
        response: decoded, without end of sequence, and with the "<think>\n" that its prompt may have ended in.
    """
    opening, closing = THINK_OPEN + "\n", "\n" + THINK_CLOSE + "\n\n"
    if not response.startswith(opening):
        return False
    reasoning, found, summary = response[len(opening) :].partition(closing)
    if not found or any(tag in part for tag in (THINK_OPEN, THINK_CLOSE) for part in (reasoning, summary)):
        return False
    return has_visible(reasoning) and has_visible(summary)


def whole_match(pattern: str) -> Callable[[str], bool]:
    """Whether a text as a whole matches a regular expression of RE2, in which "." matches line breaks, too.

    Raises:
        RewardError: the expression is none, or asks for what RE2 has not.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    whole = rf"(?s)\A(?:{pattern})\z"

    def matches(text: str) -> bool:
        return pc.match_substring_regex(pa.scalar(text.encode("utf-8", "replace").decode()), pattern=whole).as_py()

    for tried in (pattern, whole):  # the first one so that "a)(b" is no expression
        try:
            pc.match_substring_regex(pa.scalar(""), pattern=tried)
        except (pa.ArrowInvalid, UnicodeEncodeError) as error:
            reason = one_line(error).removeprefix("Invalid regular expression: ")
            raise RewardError(f"reward.format_pattern={pattern!r} is no regular expression of RE2: {reason}") from None
    return matches


_CHECKS: dict[str, Callable[[str], bool]] = {"zero": follows_format, "chat": follows_chat_format}
