"""Small tokenised sources: a .bin and .idx as Megatron lays them out, from lists of tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_r1.config.data import DataConfig
from megatron_r1.data.documents import load_documents
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.tokenizer import Tokenizer

CODES = {"uint16": 8, "int32": 4}


def write_source(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "int32", sidecar: dict | None = None) -> str:
    """Write the files and return their prefix."""
    lengths = np.array([len(document) for document in documents], np.int32)
    places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) * np.dtype(dtype).itemsize
    prefix.with_name(f"{prefix.name}.bin").write_bytes(b"".join(np.array(document, dtype).tobytes() for document in documents))
    bounds = np.arange(len(documents) + 1, dtype=np.int64)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], len(lengths), len(bounds))
    index = header + lengths.tobytes() + places.astype(np.int64).tobytes() + bounds.tobytes()
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    if sidecar is not None:
        prefix.with_name(f"{prefix.name}.json").write_text(json.dumps(sidecar))
    return str(prefix)


def with_tokens(*names: str) -> Tokenizer:
    """The tally's tokenizer with further tokens."""
    tree = json.loads(train_tally_tokenizer().tokenizer_json)
    free = max(token["id"] for token in tree["added_tokens"]) + max(tree["model"]["vocab"].values())
    for number, name in enumerate(names):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree["added_tokens"].append({"id": free + number, "content": name, "special": True, **flags})
    return Tokenizer(json.dumps(tree), "<bos>", "<eos>", "<pad>")


def tally_blend(folder: Path, documents: int = 200, tokenizer: Tokenizer | None = None) -> list[str]:
    """Two sources of the tally with the tokenizer that made them, as `megatron-r1 preprocess` leaves them, and what names them.

    The settings blend them three to one and hold a fifth of each back.
    """
    tokenizer, config = tokenizer or train_tally_tokenizer(), DataConfig()
    tokenizer.save(folder / "tokenizer")
    source = load_documents(config)
    for name, seed in (("many", 1), ("few", 2)):
        encoded = [[*source.encode(number, seed, tokenizer), tokenizer.eos_id] for number in range(documents)]
        said = {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "documents": documents}
        said |= {"tokens": sum(map(len, encoded)), "dtype": "uint16"}
        write_source(folder / name, encoded, "uint16", sidecar=said)
    blend = f"[{{path: {folder / 'many'}, weight: 3}}, {folder / 'few'}]"
    return [f"data.blend={blend}", "data.split=[4, 1]", f"data.tokenizer={folder / 'tokenizer'}"]


def numbered_documents(count: int, first: int, longest: int = 17, eos: int = 2) -> list[list[int]]:
    """Documents of different lengths that end with `eos`; their other tokens count on, so that each is found once."""
    documents = []
    for number in range(count):
        length = 1 + number * 7 % longest
        documents.append([*range(first, first + length), eos])
        first += length
    return documents
