"""Is a response right? The rule of its domain says so, or a judge if the rule has no verdict."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.protocol import Asked, Grader, ScoringService, Verdict
from megatron_r1.rewards.scorers import accuracy_reference, accuracy_scorers
from megatron_r1.tags import find_summary

Check = Callable[[Asked, str], Future[Verdict]]  #: starts checking one finished response and returns at once


def answer_check(
    scoring: ScoringService | None, judge: Grader | None = None, rewards: RewardConfig | None = None, opening: str = ""
) -> Check:
    """The check of responses.

    The rule of its domain checks a reasoning problem, if there is one. If there is none, or if the rule's verdict has no score
    (error, timeout, unscorable), the judge compares what follows the reasoning with the reference (R1 v1 (arXiv) section 2.3.3).

    Args:
        rewards: say which scorer of `scoring` checks which domain; None: the built-in ones.
        opening: what the prompt already held of the response, which `scoring` puts before it by itself.
    """

    rewards = rewards or RewardConfig()
    rules = accuracy_scorers(rewards)

    def check(asked: Asked, response: str) -> Future[Verdict]:
        rule = rules.get(asked.domain) if asked.kind == "reasoning" and scoring is not None else None
        if rule is None:
            return _grade(judge, asked, opening + response)
        by_rule = scoring.submit(rule, response, accuracy_reference(rewards, rule, asked))
        return by_rule if judge is None else _unless_scored(by_rule, lambda: _grade(judge, asked, opening + response))

    return check


def _grade(judge: Grader | None, asked: Asked, response: str) -> Future[Verdict]:
    if judge is None:
        return done(Verdict(None, "unscorable", f"no rule checks domain {asked.domain!r} and there is no judge"))
    if not asked.answer.strip():
        return done(Verdict(None, "unscorable", "there is no reference answer to compare with"))
    summary = find_summary(response)
    if summary is None:
        return done(Verdict(0.0, "wrong", "nothing follows the reasoning"))
    return judge.grade(asked.question, asked.answer, summary)


def _unless_scored(first: Future[Verdict], second: Callable[[], Future[Verdict]]) -> Future[Verdict]:
    """The first verdict, or the second if the first has no score; the second is started only then. No thread waits."""
    result: Future[Verdict] = Future()

    def take(future: Future[Verdict]) -> None:
        if future.exception() is not None:
            result.set_exception(future.exception())
        else:
            result.set_result(future.result())

    def decide(future: Future[Verdict]) -> None:
        if future.exception() is None and future.result().score is None:
            second().add_done_callback(take)
        else:
            take(future)

    first.add_done_callback(decide)
    return result


def done(verdict: Verdict) -> Future[Verdict]:
    """A verdict that is there already."""
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future
