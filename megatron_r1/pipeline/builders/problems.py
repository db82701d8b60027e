"""The problems of a run, as its prompts may be long, and what is said of those that are left out."""

from __future__ import annotations

from megatron_r1.config.schema import Config
from megatron_r1.data.problems import ProblemSource, load_problems
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.rewards.scorers import accuracy_scorers
from megatron_r1.runtime.distributed import on_rank_zero


def build_problems(config: Config, writer: PromptWriter) -> ProblemSource:
    """The problems of `data.source`, see `fit_problems`. All ranks call this."""
    return fit_problems(load_problems(config.data, accuracy_scorers(config.reward)), writer)


def fit_problems(source: ProblemSource, writer: PromptWriter) -> ProblemSource:
    """The source without too long prompts, if `data.overlong` asks for that; prints what was left out. All ranks call this."""
    fitting = writer.without_overlong(source)
    if fitting.notes:
        on_rank_zero(lambda: print("\n".join(fitting.notes), flush=True))
    return fitting
