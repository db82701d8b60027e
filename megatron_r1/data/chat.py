"""Conversations of several turns as R1's chat template renders them, tokenised turn by turn.

What a person or a model wrote never becomes a control token: in responses the reasoning tags alone are tokens, so that no response
can fake a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_r1.data.templates import fixed_texts
from megatron_r1.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
_THINK_CLOSE = "</think>"
_REASONING_TAG = re.compile(r"(</?think>)")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], response: str) -> list[int]:
    """Beginning of sequence, the turns, the response and its end of sequence.

    A system message stands bare at the beginning and earlier responses are without their reasoning, as in R1's template.
    """
    user, assistant = (tokenizer.encode(marker) for marker in fixed_texts("r1_chat"))
    token_ids = list(tokenizer.start_ids)
    for message in messages:
        if message.role == "system":
            token_ids += tokenizer.encode_plain(message.content)
        elif message.role == "user":
            token_ids += user + tokenizer.encode_plain(message.content)
        else:
            answer = message.content.rpartition(_THINK_CLOSE)[2]
            token_ids += assistant + tokenizer.encode_plain(answer) + [tokenizer.eos_id]
    pieces = [piece for piece in _REASONING_TAG.split(response) if piece]
    encoded = [tokenizer.encode(p) if _REASONING_TAG.fullmatch(p) else tokenizer.encode_plain(p) for p in pieces]
    return token_ids + assistant + [token_id for piece in encoded for token_id in piece] + [tokenizer.eos_id]
