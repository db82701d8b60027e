"""What a job of preprocessing is, and what each process that works on it keeps at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config.curation import DecontaminationConfig, DedupConfig
from megatron_r1.curation.decontaminate import EvaluationSets, load_evaluation_sets
from megatron_r1.curation.dedup import Signer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError, one_line
from megatron_r1.preprocess.note import token_dtype
from megatron_r1.preprocess.readers import ReadOptions
from megatron_r1.preprocess.sources import Source

#: called now and then with the bytes of sources and the tokens that are done since the last call
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenOptions:
    """What decides the tokens, beside sources and tokenizer."""

    read: ReadOptions = field(default_factory=ReadOptions)
    append_eod: bool = False
    bos: bool = True  #: documents begin as the tokenizer begins a sequence
    vocab_size: int = 0  #: tokens from it on are refused
    decontaminate: dict[str, str] = field(default_factory=dict)  #: name of an evaluation set -> its file
    dedup: float | None = None  #: similarity from which a document counts as a repetition; None: all stay

    def noted(self) -> dict[str, Any]:
        """As a note says it: the paths of evaluation sets are none of its business."""
        return {**asdict(self), "decontaminate": sorted(self.decontaminate)}


@dataclass(frozen=True)
class PreprocessJob:
    """Everything that a process needs to know, the same for all."""

    sources: list[Source]
    tokenizer: str  #: its folder
    output: str  #: PREFIX_text_document or PREFIX_text_sentence, of which .bin, .idx and .json are made
    options: TokenOptions
    part_bytes: int
    skip_bad: bool = False

    @property
    def folder(self) -> Path:
        """Of the parts."""
        return Path(f"{self.output}.parts")

    def unwritten(self, error: OSError) -> DataError:
        """What is said where the disk is full, or cannot be written any more."""
        reason = error.strerror or one_line(error)
        return DataError(f"{self.output}: cannot be written ({reason}); what is finished is kept: make room and start again")

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return token_dtype(self.options.vocab_size)


class Bench:
    """A process's own tokenizer, evaluation sets and hash functions, made when they are first needed."""

    def __init__(self, job: PreprocessJob) -> None:
        self.job = job

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises DataError if its folder is not one."""
        return Tokenizer.load(self.job.tokenizer)

    @cached_property
    def sets(self) -> EvaluationSets:
        """Raises DataError if a file is malformed."""
        return load_evaluation_sets(DecontaminationConfig(evaluation_sets=self.job.options.decontaminate))

    @cached_property
    def signer(self) -> Signer:
        """Of near-duplicates."""
        return Signer(dedup_config(self.job.options), seed=0)


def dedup_config(options: TokenOptions) -> DedupConfig:
    """The curation's settings with the threshold of these options."""
    return DedupConfig() if options.dedup is None else DedupConfig(threshold=options.dedup)
