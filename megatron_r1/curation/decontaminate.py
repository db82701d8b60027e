"""Decontamination: no n-gram of an evaluation set's questions may stand in the training data (R1 v2 (arXiv) D.1: 10-grams).

n-grams are of words as `words.py` has them, so that case, punctuation and line breaks hide nothing; in Chinese, of characters. A
question shorter than an n-gram has none: it matches a training prompt that has exactly its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config.curation import DecontaminationConfig
from megatron_r1.curation.records import Conversation
from megatron_r1.curation.words import hash_ngrams, words_of
from megatron_r1.data.record_files import read_records, take_text
from megatron_r1.errors import DataError


@dataclass(frozen=True)
class Match:
    """What of a training text stands in an evaluation set."""

    name: str  #: of the set
    words: str  #: the first n-gram that matched


@dataclass(frozen=True)
class EvaluationSets:
    """The n-grams of all evaluation sets, by their hashes of 64 bits: 8 bytes for each in every process that looks for them."""

    ngram: int
    sets: dict[str, np.ndarray] = field(default_factory=dict)  #: name -> hashes in order, [n-grams] uint64
    short: dict[str, frozenset[tuple[str, ...]]] = field(default_factory=dict)  #: name -> questions shorter than an n-gram

    @classmethod
    def of(cls, questions: Mapping[str, Sequence[str]], ngram: int) -> EvaluationSets:
        """From the questions of each set."""
        words = {name: [words_of(question) for question in texts] for name, texts in questions.items()}
        none = np.empty(0, np.uint64)
        hashes = {name: np.unique(np.concatenate([none, *(hash_ngrams(w, ngram) for w in rows)])) for name, rows in words.items()}
        short = {name: frozenset(tuple(w) for w in rows if 0 < len(w) < ngram) for name, rows in words.items()}
        return cls(ngram, hashes, short)

    def match(self, text: str, prompt: str) -> Match | None:
        """The first set that a text has an n-gram of, in the order of the sets.

        Args:
            prompt: what short questions are compared with.
        """
        if not self.sets:
            return None
        words = words_of(text)
        hashes = hash_ngrams(words, self.ngram)
        for name, known in self.sets.items():
            if known.size and (found := known[np.searchsorted(known[:-1], hashes)] == hashes).any():
                at = int(found.argmax())
                return Match(name, " ".join(words[at : at + self.ngram]))
        asked = tuple(words_of(prompt)[: self.ngram])
        return next((Match(name, " ".join(asked)) for name, known in self.short.items() if asked in known), None)


def load_evaluation_sets(config: DecontaminationConfig) -> EvaluationSets:
    """Read the questions of every set.

    Raises:
        DataError: a file that is missing or malformed, or an item without a question, with its line.
    """
    questions = {name: read_questions(Path(path), config.fields) for name, path in config.evaluation_sets.items()}
    return EvaluationSets.of(questions, config.ngram)


def read_questions(path: Path, fields: Sequence[str]) -> list[str]:
    """The question of every item of a file (.jsonl, .json, either gzipped, .parquet): the first of `fields` that it has.

    Raises:
        DataError: see `load_evaluation_sets`.
    """
    return [take_text(record, _question_field(record, fields, where), where) for where, record in read_records(path)]


def compared_text(conversation: Conversation, text: str) -> str:
    """The text of a conversation that is compared: its prompt, or the whole conversation."""
    return conversation.prompt if text == "prompt" else conversation.text


def _question_field(record: dict[str, Any], fields: Sequence[str], where: str) -> str:
    for name in fields:
        if name in record:
            return name
    raise DataError(
        f"{where}: none of the fields {', '.join(fields)} is there; name the question's in curation.decontamination.fields"
    )
