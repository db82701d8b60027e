"""Accuracy reward for mathematics in the trainer's own process; the scoring engine uses `MathScorer` itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.rewards.math_answer import MathScorer
from megatron_r1.rewards.math_policy import DEFAULT_POLICY, MathPolicy
from megatron_r1.rewards.tags import AnswerPlace

if TYPE_CHECKING:
    from megatron_r1.types import Prompt, Rollout


class AccuracyReward:
    """1 where a finished response gives the reference answer in the required place, else 0 (v2 section 2.2)."""

    name = "accuracy"

    def __init__(self, answer_location: AnswerPlace, policy: MathPolicy = DEFAULT_POLICY):
        """Args: see `MathScorer`."""
        self._scorer = MathScorer(answer_location, policy)

    def score(self, prompt: Prompt, rollout: Rollout) -> float:
        """See `Reward`. A prompt without a reference answer scores 0 here."""
        if not rollout.finished:
            return 0.0
        return self._scorer.judge(rollout.text, prompt.answer).score or 0.0
