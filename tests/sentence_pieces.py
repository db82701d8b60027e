"""SentencePiece models that tests train themselves, and the lines of eight scripts that they are trained on."""

from __future__ import annotations

import io
import random
from functools import cache
from typing import Any

import sentencepiece

#: the first letter and how many: Latin, Greek, Cyrillic, Arabic, Devanagari, Hiragana, Han, Hangul
_SCRIPTS = {0x61: 26, 0x3B1: 25, 0x430: 32, 0x627: 36, 0x915: 37, 0x3042: 78, 0x4E00: 96, 0xAC00: 128}
#: what a text may hold beside words: spaces, line ends, characters that nmt_nfkc changes, marks, emoji, control symbols as text
ODD = [
    " ", "  ", "\t", "\n", "\r\n", "\u3000", "\u2581", "\ufb01", "\uff11", "\uff1c/s\uff1e", "e\u0301", "\u1112\u1161\u11ab",
    "\uff8a\uff9f", "\u200d", "\U0001f468", "\0", "\ufffd", "<s>", "</s>", "<unk>", "<0x41>", "<think>", "</think>", "<table>",
    "<ctl>", "\ud800",
]  # fmt: skip


@cache
def _words() -> list[list[str]]:
    generator = random.Random("words")

    def word(first: int, count: int) -> str:
        return "".join(chr(first + generator.randrange(count)) for _ in range(generator.randrange(1, 6)))

    return [[word(first, count) for _ in range(150)] for first, count in _SCRIPTS.items()]


def lines(count: int, seed: int = 0) -> list[str]:
    """Sentences of made words, each in one of eight scripts; of a script's words some come again and again."""
    generator = random.Random(f"lines {seed}")
    found = []
    for number in range(count):
        words = generator.choices(_words()[number % 8], k=generator.randrange(3, 12))
        found.append(" ".join(words) + generator.choice([".", "!", " 12,5", "", "\uff1f"]))
    return found


def odd_texts(count: int) -> list[str]:
    """Pieces of words between what is odd."""
    generator = random.Random("odd")
    words = [word for line in lines(16) for word in line.split()]
    return ["".join(generator.choice(generator.choice([words, ODD])) for _ in range(generator.randrange(12))) for _ in range(count)]


@cache
def _train(settings: tuple[tuple[str, Any], ...]) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(400)), model_writer=written, minloglevel=2, num_threads=1, **dict(settings)
    )
    return written.getvalue()


def train(**settings: Any) -> bytes:
    """The content of a .model file; by default BPE with bytes and symbols."""
    settings = {
        "model_type": "bpe", "vocab_size": 900, "character_coverage": 0.98, "hard_vocab_limit": False, "byte_fallback": True,
        "user_defined_symbols": ("<think>", "</think>", "<table>", "\u2581\u2581"), "control_symbols": ("<ctl>",), **settings,
    }  # fmt: skip
    joined = {key: ",".join(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return _train(tuple(joined.items()))


#: settings that decide how a text is read
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "unigram": {"model_type": "unigram"},
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "gemma": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "unigram, no bytes": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": False},
    "char": {"model_type": "char"},
}  # fmt: skip
