"""The vocabulary of the quickstart."""

from __future__ import annotations

import random

from megatron_r1.data.tally import pretraining_document
from megatron_r1.data.templates import marker_texts
from megatron_r1.data.tokenizer import TAGS, TALLY_PATTERN, Tokenizer, train_tokenizer

_NUM_DOCUMENTS = 5000


def train_tally_tokenizer(vocab_size: int = 448, template: str = "r1_zero", heldout_fraction: float = 0.1) -> Tokenizer:
    """A vocabulary in which the template is two tokens and every word, signed digit and number of the tally is one."""
    rng = random.Random("tally tokenizer")
    texts = []
    for _ in range(_NUM_DOCUMENTS):
        question, continuation = pretraining_document(rng, heldout_fraction)
        for tag in TAGS:
            continuation = continuation.replace(tag, "\n")
        texts += [f" {question}", *filter(None, continuation.split("\n"))]
    return train_tokenizer(texts, vocab_size, TALLY_PATTERN, marker_texts(template))
