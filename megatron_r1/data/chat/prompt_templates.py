"""The texts of the prompt templates, word for word, and R1's chat template as Jinja text for other programs.

A template for questions is fixed text, the question, fixed text. The three parts are kept apart because they are tokenised apart: a
question is untrusted and must never turn into control tokens (see `Tokenizer.encode_prompt`). Whole conversations: `template.py`.
"""

from __future__ import annotations

import json

from megatron_r1.errors import ConfigError
from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

# R1 v1 (arXiv 2501.12948v1) Table 1, in which "prompt" stands for the question. R1 v2 differs in "<think>...</think>" only.
_R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks "
    "about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are "
    f"enclosed within {THINK_OPEN} {THINK_CLOSE} and {ANSWER_OPEN} {ANSWER_CLOSE} tags, respectively, i.e., {THINK_OPEN} reasoning "
    f"process here {THINK_CLOSE} {ANSWER_OPEN} answer here {ANSWER_CLOSE}. User: {{question}}. Assistant:"
)
# DeepSeek-R1's chat template. The tokenizer adds the beginning of sequence.
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
#: what the later revision of the template puts at the end of a prompt, because R1 sometimes answered with empty reasoning
OPENED = f"{THINK_OPEN}\n"
_R1_CHAT = USER + "{question}" + ASSISTANT  # the first published version, generation prompt included
_R1_CHAT_THINK = _R1_CHAT + OPENED
# The published Jinja text has branches for tools too; without tools this one renders the same.
_R1_JINJA = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] -%}"
    "{%- endfor -%}"
    "{{- (bos_token or '') + ns.system -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '" + USER + "' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' + message['content'].split('" + THINK_CLOSE + "')[-1] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)  # fmt: skip

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


def r1_chat_jinja(opened: bool = False, begins: bool = True) -> str:
    """R1's chat template as the text that goes with a model.

    Args:
        opened: its generation prompt ends with `OPENED`.
        begins: it prints the beginning of sequence, if the tokenizer has one.
    """
    opening = OPENED.replace("\n", "\\n") if opened else ""
    jinja = _R1_JINJA if begins else _R1_JINJA.replace("(bos_token or '') + ", "")
    return jinja + "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + opening + "' -}}{%- endif -%}"


def r1_zero_jinja(begins: bool = True) -> str:
    """R1-Zero's template as Jinja text: one question, and nothing before it.

    Args:
        begins: it prints the beginning of sequence, if the tokenizer has one.
    """
    before, after = TEMPLATES["r1_zero"].split("{question}")
    start = "(bos_token or '') + " if begins else ""
    return (
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
        "{{- raise_exception('the template of R1-Zero holds one question of the user') -}}"
        "{%- endif -%}"
        f"{{{{- {start}{_jinja_text(before)} + messages[0]['content'] + {_jinja_text(after)} -}}}}"
    )


def with_system_jinja(jinja: str, system: str) -> str:
    """A chat template that puts this system message before conversations that begin with none."""
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{{'role': 'system', 'content': {_jinja_text(system)}}}] + messages -%}}"
        "{%- endif -%}" + jinja
    )


def _jinja_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a literal of Jinja has the escapes of JSON, but not its pairs of surrogates


def render(template: str, question: str) -> str:
    """The text of the prompt; the response starts right after its last character."""
    return "".join(split_prompt(template, question))


def fixed_texts(template: str) -> tuple[str, str]:
    """The texts before and after every question."""
    before, _, after = split_prompt(template, "")
    return before, after


def marker_texts(template: str) -> tuple[str, str]:
    """The fixed texts that a vocabulary may hold as one token each. <think>, which the model writes itself, is part of none."""
    return fixed_texts("r1_chat" if template == "r1_chat_think" else template)
