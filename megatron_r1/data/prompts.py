"""Prompts in an order that depends on the seed and the position alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.load import load_chat_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.prompt_templates import TEMPLATES
from megatron_r1.data.chat.template import ChatTemplate
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.problems import ProblemSource
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.tags import THINK_OPEN
from megatron_r1.types import Prompt


class PromptStream:
    """An endless stream of training prompts whose whole state is one number.

    Problems of a file come once an epoch, reshuffled for each; generated problems are drawn independently.
    """

    def __init__(self, source: ProblemSource, tokenizer: Tokenizer, template: str, seed: int, max_prompt_tokens: int):
        """
        Raises:
            DataError: a prompt of a file is longer than `max_prompt_tokens`.
        """
        self._source, self._tokenizer, self._template = source, tokenizer, template
        self._seed, self._max_prompt_tokens = seed, max_prompt_tokens
        self._position = 0
        for problem in source.fixed_problems():
            make_prompt(problem, tokenizer, template, max_prompt_tokens)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        positions = range(self._position, self._position + count)
        self._position += count
        problems = [self._source.train(position, self._seed) for position in positions]
        return [make_prompt(problem, self._tokenizer, self._template, self._max_prompt_tokens) for problem in problems]

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


def heldout_prompts(
    source: ProblemSource, tokenizer: Tokenizer, template: str, count: int, seed: int, max_prompt_tokens: int
) -> list[Prompt]:
    """`count` prompts of different held-out problems, the same for the same seed.

    Raises:
        DataError: too few held-out problems, or one longer than `max_prompt_tokens`.
    """
    return [make_prompt(problem, tokenizer, template, max_prompt_tokens) for problem in source.heldout(count, seed)]


def make_prompt(problem: Problem, tokenizer: Tokenizer, template: str, max_prompt_tokens: int) -> Prompt:
    """Render and tokenise one problem.

    Raises:
        DataError: the prompt is longer than `max_prompt_tokens`.
    """
    text, token_ids = encode_problem(problem, tokenizer, template)
    if len(token_ids) > max_prompt_tokens:
        raise DataError(
            f"problem {problem.id} has a prompt of {len(token_ids)} tokens, data.max_prompt_tokens is {max_prompt_tokens};"
            " raise it, remove the problem or leave all such out with data.overlong=drop"
        )
    known = {name: getattr(problem, name) for name in ("language", "domain", "kind", "preference")}
    context = tuple((message.role, message.content) for message in problem.context)
    return Prompt(problem.id, problem.question, problem.answer, text, tuple(token_ids), **known, context=context)


def make_prompts(problems: Sequence[Problem], tokenizer: Tokenizer, config: DataConfig) -> list[Prompt]:
    """The prompts of problems, without the too long ones if `config.overlong` asks for that."""
    fitting = [problem for problem in problems if config.overlong == "error" or _is_short_enough(problem, tokenizer, config)]
    return [make_prompt(problem, tokenizer, config.template, config.max_prompt_tokens) for problem in fitting]


def encode_problem(problem: Problem, tokenizer: Tokenizer, template: str) -> tuple[str, list[int]]:
    """The prompt as text and ids.

    Raises:
        DataError: the template has no place for what was said before the question.
    """
    if not problem.context and template in TEMPLATES:
        return tokenizer.encode_prompt(template, problem.question)
    try:
        ids = _load_template(template, tokenizer).encode_prompt([*problem.context, Message("user", problem.question)])
    except DataError as error:
        raise DataError(f"{problem.where or f'problem {problem.id}'}: {error}") from error
    return tokenizer.decode_everything(ids), ids


def without_overlong(source: ProblemSource, tokenizer: Tokenizer, config: DataConfig) -> ProblemSource:
    """The source without problems whose prompts are longer than `max_prompt_tokens`, if `config.overlong` asks for that."""
    if config.overlong == "error":
        return source
    why = f"longer than data.max_prompt_tokens={config.max_prompt_tokens}"
    return source.select(lambda problem: _is_short_enough(problem, tokenizer, config), why)


def _is_short_enough(problem: Problem, tokenizer: Tokenizer, config: DataConfig) -> bool:
    return len(encode_problem(problem, tokenizer, config.template)[1]) <= config.max_prompt_tokens


@lru_cache(maxsize=2)
def _load_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    return load_chat_template(name, tokenizer)


def force_thinking(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    """The prompt with an opened <think> at its end: measures how well a base reasons, apart from whether it chooses to reason."""
    return replace(prompt, text=prompt.text + THINK_OPEN, token_ids=prompt.token_ids + tuple(tokenizer.encode(THINK_OPEN)))
