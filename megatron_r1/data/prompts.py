"""Prompts in an order that depends on the seed and the position alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.load import load_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.prompt_templates import TEMPLATES
from megatron_r1.data.chat.wording import Wording
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.problems import ProblemSource
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.tags import THINK_OPEN, opening_of
from megatron_r1.types import Prompt


class PromptWriter:
    """Makes prompts of problems as the settings ask: the template, what stands around every question, how long a prompt may be."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        """
        Raises:
            ConfigError: settings that do not fit the template, see `load_template`.
        """
        self._config, self._tokenizer = config, tokenizer
        self._template = load_template(config, tokenizer)
        self._is_fixed = config.template in TEMPLATES and config.system_prompt is None

    @cached_property
    def opening(self) -> str:
        """What every prompt already holds of its response: a <think>, or nothing."""
        return opening_of(self.encode(Problem("?", "?", ""))[0])

    def encode(self, problem: Problem) -> tuple[str, list[int]]:
        """The prompt as text and ids.

        Raises:
            DataError: the template has no place for what was said before the question.
        """
        if self._is_fixed and not problem.context:
            return self._tokenizer.encode_prompt(self._config.template, Wording.of(self._config).surround(problem.question))
        try:
            ids = self._template.encode_prompt([*problem.context, Message("user", problem.question)])
        except DataError as error:
            raise DataError(f"{problem.where or f'problem {problem.id}'}: {error}") from error
        return self._tokenizer.decode_everything(ids), ids

    def write(self, problem: Problem) -> Prompt:
        """The prompt of one problem.

        Raises:
            DataError: it is longer than `data.max_prompt_tokens`, or opens the reasoning where others do not.
        """
        text, token_ids = self.encode(problem)
        limit = self._config.max_prompt_tokens
        if len(token_ids) > limit:
            raise DataError(
                f"problem {problem.id} has a prompt of {len(token_ids)} tokens, data.max_prompt_tokens is {limit};"
                " raise it, remove the problem or leave all such out with data.overlong=drop"
            )
        if opening_of(text) != self.opening:
            raise DataError(
                f"{problem.where or f'problem {problem.id}'}: the chat template ends this prompt with {THINK_OPEN} and others "
                "not, or the other way round, so that graders cannot tell the answer: remove the problem, or fix the template's "
                "choice with data.template_arguments"
            )
        known = {name: getattr(problem, name) for name in ("language", "domain", "kind", "preference")}
        context = tuple((message.role, message.content) for message in problem.context)
        return Prompt(problem.id, problem.question, problem.answer, text, tuple(token_ids), **known, context=context)

    def fits(self, problem: Problem) -> bool:
        """Whether its prompt is short enough, or its length is an error."""
        return self._config.overlong == "error" or len(self.encode(problem)[1]) <= self._config.max_prompt_tokens

    def write_fitting(self, problems: Sequence[Problem]) -> list[Prompt]:
        """The prompts of problems, without the too long ones if `data.overlong` asks for that."""
        return [self.write(problem) for problem in problems if self.fits(problem)]

    def without_overlong(self, source: ProblemSource) -> ProblemSource:
        """The source without problems whose prompts are too long, if `data.overlong` asks for that."""
        if self._config.overlong == "error":
            return source
        return source.select(self.fits, f"longer than data.max_prompt_tokens={self._config.max_prompt_tokens}")


class PromptStream:
    """An endless stream of training prompts whose whole state is one number.

    Problems of a file come once an epoch, reshuffled for each; generated problems are drawn independently.
    """

    def __init__(self, source: ProblemSource, writer: PromptWriter, seed: int):
        """
        Raises:
            DataError: a prompt of a file is too long.
        """
        self._source, self._writer, self._seed = source, writer, seed
        self._position = 0
        for problem in source.fixed_problems():
            writer.write(problem)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        positions = range(self._position, self._position + count)
        self._position += count
        return [self._writer.write(self._source.train(position, self._seed)) for position in positions]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, fit for JSON."""
        prints = {"problems": self._source.fingerprint, "content": self._source.content}
        return {"position": self._position, "seed": self._seed, **prints}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            DataError: the seed or the problems are not those of the saved run, so the position means nothing.
        """
        if state["problems"] != self._source.fingerprint and state.get("content") != self._source.content:
            raise DataError("data.source: the problems are not those this run began with; restore the file or start a new run_dir")
        if state["seed"] != self._seed:
            raise DataError(f"seed={self._seed} but this run began with {state['seed']}; restore it or start a new run_dir")
        self._position = state["position"]


def heldout_prompts(source: ProblemSource, writer: PromptWriter, count: int, seed: int) -> list[Prompt]:
    """`count` prompts of different held-out problems, the same for the same seed.

    Raises:
        DataError: too few held-out problems, or one that is too long.
    """
    return [writer.write(problem) for problem in source.heldout(count, seed)]


def force_thinking(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    """The prompt with an opened <think> at its end: measures how well a base reasons, apart from whether it chooses to reason."""
    return replace(prompt, text=prompt.text + THINK_OPEN, token_ids=prompt.token_ids + tuple(tokenizer.encode(THINK_OPEN)))
