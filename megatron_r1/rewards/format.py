"""Format reward: did the response keep to the R1-Zero template?"""

from __future__ import annotations

from megatron_r1.rewards.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from megatron_r1.types import Prompt, Rollout


class FormatReward:
    """1 where a finished response is one <think> element and then one <answer> element, else 0.

    Nothing but whitespace stands outside of the two, neither is blank, and no tag stands inside of them. The paper states that
    the format is rewarded (v2 section 2.2) but neither the value nor the exact check.
    """

    name = "format"

    def score(self, prompt: Prompt, rollout: Rollout) -> float:
        """See `Reward`."""
        return float(rollout.finished and follows_format(rollout.text))


def follows_format(response: str) -> bool:
    """Whether the text alone has the format."""
    if any(response.count(tag) != 1 for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)):
        return False
    before, _, rest = response.partition(THINK_OPEN)
    reasoning, _, rest = rest.partition(THINK_CLOSE)
    between, _, rest = rest.partition(ANSWER_OPEN)
    answer, closing, after = rest.partition(ANSWER_CLOSE)
    in_order = bool(closing)  # a tag that comes too early leaves nothing for the later partitions
    outside_is_blank = not (before + between + after).strip()
    return in_order and outside_is_blank and bool(reasoning.strip()) and bool(answer.strip())
