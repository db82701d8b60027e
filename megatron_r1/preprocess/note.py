"""The note beside token files, PREFIX.json: what made them. An .idx names no tokenizer; training reads it here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_LEAST_INT32 = 65500  # vocabularies below it have two bytes a token


@dataclass(frozen=True)
class TokenNote:
    """What made a pair of token files, the same however many processes did it."""

    tokenizer: str  #: `Tokenizer.fingerprint`
    vocab_size: int  #: every token is below it
    eos_id: int
    dtype: str  #: "uint16" or "int32"
    documents: int
    sequences: int  #: as many as documents, or sentences
    tokens: int
    options: dict[str, Any] = field(default_factory=dict)  #: what else decided the tokens
    left_out: dict[str, int] = field(default_factory=dict)  #: reason -> documents
    sources: list[dict[str, Any]] = field(default_factory=list)  #: path, bytes and checksum of each file
    format: int = 1

    def as_text(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def token_dtype(vocab_size: int) -> np.dtype:
    """The numbers of a vocabulary's tokens, as `DType.optimal_dtype` of Megatron chooses them, without importing it."""
    return np.dtype(np.uint16 if vocab_size < _LEAST_INT32 else np.int32)


def token_paths(prefix: Path) -> tuple[Path, Path, Path]:
    """The .bin, the .idx and the note of a prefix, whose name may hold dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")
