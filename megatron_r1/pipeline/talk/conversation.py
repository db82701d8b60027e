"""The turns of a conversation with a model, as it was trained to be asked."""

from __future__ import annotations

from collections.abc import Callable

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.load import load_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.tags import find_summary, opening_of, whole_response
from megatron_r1.types import Prompt, Rollout, Sampling

GoOn = Callable[[list[int]], bool]
Answer = Callable[[Prompt, Sampling, int, GoOn], Rollout]  #: `VllmProcessEngine.answer`


class TalkConversation:
    """Questions and what the model answered.

    Args:
        data: template, system message and what stands around a question.
        context: most tokens of history and response together.

    Raises:
        ConfigError: settings that do not fit the template.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, answer: Answer, context: int) -> None:
        self._tokenizer, self._answer, self._context = tokenizer, answer, context
        self._data, self._template = data, load_template(data, tokenizer)
        self._history: list[Message] = []

    @property
    def holds_one_question(self) -> bool:
        """Whether the template has no place for what was said before."""
        return self._data.template == "r1_zero"

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._data.system_prompt

    def set_system(self, text: str | None) -> None:
        """Another system message, or none; the conversation begins anew. Raises ConfigError if the template has no place for it."""
        data = self._data.model_copy(update={"system_prompt": text})
        self._template, self._data = load_template(data, self._tokenizer), data
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._history.clear()

    def ask(self, question: str, sampling: Sampling, seed: int, go_on: Callable[[str, list[int]], bool]) -> tuple[Rollout, bool]:
        """Ask, with what was said before.

        Args:
            sampling: `max_tokens` is a limit; a conversation may have room for less.
            go_on: called with what the prompt holds of the response, once and without tokens, and then with "" and new tokens.

        Returns:
            The response, and whether it is kept: one without anything after its reasoning is forgotten, question included.

        Raises:
            DataError: the template has no place for it, or the conversation has grown too long.
            EngineLost: the engine is gone.
        """
        before = [] if self.holds_one_question else self._history
        asked = [*before, Message("user", question)]
        ids = self._template.encode_prompt(asked)
        room = self._context - len(ids)
        if room < 1:
            raise DataError(f"the conversation has {len(ids)} tokens, --context is {self._context}: /reset begins anew")
        text = self._tokenizer.decode_everything(ids)
        if opening := opening_of(text):
            go_on(opening, [])
        limit = Sampling(1, sampling.temperature, sampling.top_p, min(sampling.max_tokens, room))
        prompt = Prompt("question", question, "", text, tuple(ids))
        rollout = self._answer(prompt, limit, seed, lambda new: go_on("", new))
        said = whole_response(text, rollout.text)
        is_kept = find_summary(said) is not None
        if is_kept:
            self._history = [*asked, Message("assistant", said)]
        return rollout, is_kept
