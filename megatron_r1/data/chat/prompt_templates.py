"""Prompt templates, word for word.

A template is fixed text, the question, fixed text. The three parts are kept apart because they are tokenised apart: a question
is untrusted and must never turn into control tokens (see `Tokenizer.encode_prompt`).
"""

from __future__ import annotations

from megatron_r1.errors import ConfigError

# arXiv 2501.12948v1 Table 1, where the word "prompt" stands for the question. v2 differs only in "<think>...</think>".
_R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks "
    "about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {question}. Assistant:"
)
# DeepSeek-R1's chat template (first published version), generation prompt included. Beginning-of-sequence is the tokenizer's.
_R1_CHAT = "<｜User｜>{question}<｜Assistant｜>"
# Its later revision opens the reasoning in the prompt, because R1 sometimes answered with an empty one.
_R1_CHAT_THINK = _R1_CHAT + "<think>\n"

TEMPLATES = {"r1_zero": _R1_ZERO, "r1_chat": _R1_CHAT, "r1_chat_think": _R1_CHAT_THINK}


def split_prompt(template: str, question: str) -> tuple[str, str, str]:
    """The rendered prompt as (fixed text before, question, fixed text after); joined, they are `render(template, question)`.

    A space before the question goes with the question, because byte-level vocabularies hold " word" as one token.

    Raises:
        ConfigError: unknown template.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"data.template={template!r} is no template for questions; choose one of {', '.join(TEMPLATES)}")
    before, after = TEMPLATES[template].split("{question}")
    fixed = before.rstrip(" ")
    return fixed, before[len(fixed) :] + question, after


def render(template: str, question: str) -> str:
    """The text a model is prompted with; its response starts right after the last character."""
    return "".join(split_prompt(template, question))


def fixed_texts(template: str) -> tuple[str, str]:
    """What stands before and after every question."""
    before, _, after = split_prompt(template, "")
    return before, after


def marker_texts(template: str) -> tuple[str, str]:
    """The fixed texts that a vocabulary may hold as one token each; <think>, which the model writes itself, is never a part of one."""
    return fixed_texts("r1_chat" if template == "r1_chat_think" else template)
