"""The vocabularies of the generated worlds."""

from __future__ import annotations

import random

from megatron_r1.data.chat.prompt_templates import ASSISTANT, USER, marker_texts
from megatron_r1.data.tally.arithmetic import pretraining_document
from megatron_r1.data.tally.requests import draw_request, tally_chat_document
from megatron_r1.data.tokenizer import TAGS, TALLY_PATTERN, Tokenizer, train_tokenizer

_NUM_DOCUMENTS = 5000
_CHAT_TEXTS = ("\n\n", "So \\boxed{8}.", "共\\boxed{8}。")  # what only the chat format has, many times over


def train_generated_tokenizer(source: str, vocab_size: int, template: str, heldout_fraction: float) -> Tokenizer:
    """The vocabulary of `data.source`, "tally" or "tally_chat"."""
    train = {"tally": train_tally_tokenizer, "tally_chat": train_tally_chat_tokenizer}[source]
    return train(vocab_size, template, heldout_fraction)


def train_tally_tokenizer(vocab_size: int = 448, template: str = "r1_zero", heldout_fraction: float = 0.1) -> Tokenizer:
    """A vocabulary in which the template is two tokens and every word, signed digit and number of the tally is one."""
    rng = random.Random("tally tokenizer")
    texts = []
    for _ in range(_NUM_DOCUMENTS):
        question, continuation = pretraining_document(rng, heldout_fraction)
        texts += [f" {question}", *_without_tags(continuation)]
    return train_tokenizer(texts, vocab_size, TALLY_PATTERN, marker_texts(template))


def train_tally_chat_tokenizer(vocab_size: int = 512, template: str = "r1_zero", heldout_fraction: float = 0.1) -> Tokenizer:
    """The same with the words of the requests, the turn markers of the chat template and the marks of its answers."""
    rng = random.Random("tally chat tokenizer")
    texts = list(_CHAT_TEXTS) * _NUM_DOCUMENTS
    for _ in range(_NUM_DOCUMENTS):
        question, continuation = tally_chat_document(rng, heldout_fraction)
        texts += [f" {question}", *_without_tags(continuation), draw_request(rng, False, heldout_fraction).thought]
    return train_tokenizer(texts, vocab_size, TALLY_PATTERN, (*marker_texts(template), USER, ASSISTANT))


def _without_tags(text: str) -> list[str]:
    for tag in TAGS:
        text = text.replace(tag, "\n")
    return [part for part in text.split("\n") if part]
