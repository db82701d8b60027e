"""The chat template that `data.template` names."""

from __future__ import annotations

from megatron_r1.data.chat.prompt_templates import TEMPLATES
from megatron_r1.data.chat.template import ChatTemplate, R1Chat, R1Zero
from megatron_r1.data.chat.tokenizer_template import TokenizerTemplate
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError


def load_chat_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that `data.template` names: "tokenizer" is the tokenizer's own.

    Raises:
        ConfigError: unknown name, or a tokenizer without a template.
    """
    if name == "tokenizer":
        return TokenizerTemplate(tokenizer)
    if name == "r1_zero":
        return R1Zero(tokenizer)
    if name not in TEMPLATES:
        raise ConfigError(f"data.template={name!r} is unknown; choose one of {', '.join(TEMPLATES)}, tokenizer")
    return R1Chat(tokenizer, opened=name == "r1_chat_think")
