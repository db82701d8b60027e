"""The chat template that `data.template` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.prompt_templates import TEMPLATES
from megatron_r1.data.chat.template import ChatTemplate, R1Chat, R1Zero
from megatron_r1.data.chat.tokenizer_template import TokenizerTemplate
from megatron_r1.data.chat.wording import WordedTemplate, Wording
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError


def load_template(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of `data.template` with its arguments, and with what the settings put around every question.

    Raises:
        ConfigError: see `load_chat_template`; a system message for a template that has no place for one.
    """
    wording = Wording.of(config)
    if wording.system is not None and config.template == "r1_zero":
        raise ConfigError("data.system_prompt has no place in data.template=r1_zero: drop it, or choose another data.template")
    template = load_chat_template(config.template, tokenizer, config.template_arguments)
    return template if wording == Wording() else WordedTemplate(template, wording)


def load_chat_template(name: str, tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The template that `data.template` names: "tokenizer" is the tokenizer's own.

    Args:
        arguments: `data.template_arguments`, which only a tokenizer's own template takes.

    Raises:
        ConfigError: unknown name, a tokenizer without a template, or an argument that the template does not read.
    """
    if name == "tokenizer":
        return TokenizerTemplate(tokenizer, arguments or {})
    if arguments:
        raise ConfigError(f"data.template_arguments.{min(arguments)}: data.template={name} takes no arguments; drop them")
    if name == "r1_zero":
        return R1Zero(tokenizer)
    if name not in TEMPLATES:
        raise ConfigError(f"data.template={name!r} is unknown; choose one of {', '.join(TEMPLATES)}, tokenizer")
    return R1Chat(tokenizer, opened=name == "r1_chat_think")
