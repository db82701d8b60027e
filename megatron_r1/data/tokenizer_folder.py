"""The files of a tokenizer in a folder: what is read of them, what goes with a model, and what is said of other kinds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_r1.data.sentence_pieces.model import PieceModel
from megatron_r1.data.sentence_pieces.tokenizer_json import tokenizer_json
from megatron_r1.errors import DataError, one_line

VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SPECIAL, _ADDED = "special_tokens_map.json", "added_tokens.json"
PIECES = "tokenizer.model"
_SHIFTED = "sentencepiece.bpe.model"  # of XLM-R and its kin: transformers puts four tokens before, and drops others
#: key of tokenizer_config.json: the file that encodes here in the place of tokenizer.json, which was made of it
_ENCODER = "text_encoder"
#: what else belongs to a tokenizer and goes where it goes
_BESIDE = (
    _SPECIAL, TEMPLATE, _ADDED, "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", PIECES,
    "spiece.model", _SHIFTED, "tiktoken.model", "tekken.json",
)  # fmt: skip
TOKENIZER_FILES = (VOCABULARY, SETTINGS, *_BESIDE)
_CONTROL = ("bos_token", "eos_token", "pad_token")
#: the keys that this project wrote before it kept a tokenizer's own settings; such a folder says nothing of BOS, but means it
_EARLIER_KEYS = {"tokenizer_class", *_CONTROL, "clean_up_tokenization_spaces", "chat_template"}
_MAKE_JSON = (
    "transformers makes a tokenizer.json of it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW); give NEW as "
    "data.tokenizer"
)


@dataclass(frozen=True)
class TokenizerFolder:
    """What a folder says of a tokenizer beside its vocabulary."""

    config: Mapping[str, Any] = field(default_factory=dict)  #: tokenizer_config.json
    beside: Mapping[str, bytes] = field(default_factory=dict)  #: further files, see `TOKENIZER_FILES`

    @cached_property
    def pieces(self) -> PieceModel | None:
        """The SentencePiece model that encodes; None where tokenizer.json does.

        Raises:
            DataError: the settings name one that is not there.
        """
        named = self.config.get(_ENCODER)
        if named is None:
            return None
        if named != PIECES or PIECES not in self.beside:
            raise DataError(f"{SETTINGS} has {_ENCODER}={named!r}, but there is no {PIECES} beside it")
        return PieceModel(self.beside[PIECES])

    def with_chat_template(self, chat_template: str) -> TokenizerFolder:
        """The same with another chat template, wherever the former one stood."""
        beside = {name: content for name, content in self.beside.items() if name != "chat_template.json"}
        config = dict(self.config)
        if TEMPLATE in beside:
            beside[TEMPLATE] = chat_template.encode()
            config.pop("chat_template", None)
        elif isinstance(config.get("chat_template"), list):
            others = [entry for entry in config["chat_template"] if entry["name"] != "default"]
            config["chat_template"] = [{"name": "default", "template": chat_template}, *others]
        else:
            config["chat_template"] = chat_template
        return TokenizerFolder(config, beside)

    def write(self, folder: Path, tokenizer_json: str) -> None:
        """Write every file, each under a temporary name first.

        Raises:
            DataError: the folder cannot be written.
        """
        settings = json.dumps(dict(self.config), indent=2, ensure_ascii=False) + "\n"
        files = {VOCABULARY: tokenizer_json.encode(), SETTINGS: settings.encode(), **self.beside}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                temporary = folder / f".{name}.{os.getpid()}"
                temporary.write_bytes(content)
                temporary.rename(folder / name)
        except OSError as error:
            raise DataError(f"{folder}: cannot write the tokenizer ({error.strerror})") from error


@dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer as its folder has it."""

    tokenizer_json: str
    bos: str | None
    eos: str
    pad: str | None
    adds_bos: bool | None  #: as the settings say; None: they do not say it, tokenizer.json does
    chat_template: str | None
    folder: TokenizerFolder


def read_tokenizer_folder(folder: Path) -> FoundTokenizer:
    """Read tokenizer.json, or a SentencePiece model in its place, tokenizer_config.json and what stands beside them.

    Args:
        folder: the folder, or the file of a SentencePiece model, which then stands for itself.

    Raises:
        DataError: a missing or malformed file, named; of another kind of vocabulary, how to make a tokenizer.json of it.
    """
    if folder.is_file():
        return _of_pieces(folder, {}, {})
    pieces, vocabulary = None, ""
    if folder.is_dir() and not (folder / VOCABULARY).is_file():
        if kind := _other_vocabulary(folder):
            raise DataError(f"{folder} has no {VOCABULARY} but {kind}")
        pieces = _piece_file(folder)
    if pieces is None:
        vocabulary = _read_tokenizer_file(folder / VOCABULARY)
    config_text = "{}" if pieces is not None and not (folder / SETTINGS).is_file() else _read_tokenizer_file(folder / SETTINGS)
    try:
        config = json.loads(config_text)
        beside = {name: (folder / name).read_bytes() for name in _BESIDE if (folder / name).is_file()}
        special = json.loads(beside[_SPECIAL]) if _SPECIAL in beside else {}
        tokens = {key: _token_text(config[key] if key in config else special.get(key)) for key in _CONTROL}
        chat_template = _read_chat_template(config, beside)
        says = config.get("add_bos_token")
    except (ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{folder / SETTINGS}: not a tokenizer config ({error})") from error
    if says is not None and not isinstance(says, bool):
        raise DataError(f"{folder / SETTINGS}: add_bos_token is {says!r}, it must be true or false")
    if pieces is not None:
        named = {key: token for key, token in tokens.items() if key in config or key in special}
        return _of_pieces(pieces, config, beside, named, chat_template)
    bos, eos, pad = tokens.values()
    if eos is None:
        raise DataError(f"{folder / SETTINGS}: eos_token is missing")
    if says is None and set(config) <= _EARLIER_KEYS:
        says = True
    return FoundTokenizer(vocabulary, bos, eos, pad, says, chat_template, TokenizerFolder(config, beside))


def holds_tokenizer(path: Path) -> bool:
    """Whether `read_tokenizer_folder` finds a vocabulary there."""
    if path.is_file():
        return path.suffix == ".model"
    return path.is_dir() and ((path / VOCABULARY).is_file() or (path / PIECES).is_file())


def _read_tokenizer_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error}); make one with tools/train_tokenizer.py") from error


def _of_pieces(
    path: Path,
    config: Mapping[str, Any],
    beside: Mapping[str, bytes],
    named: Mapping[str, str | None] | None = None,
    chat_template: str | None = None,
) -> FoundTokenizer:
    """The tokenizer of a SentencePiece model, with the tokenizer.json that other programs read.

    Args:
        path: the model's file.
        config: tokenizer_config.json.
        beside: further files of its folder.
        named: the control tokens that the settings name, which count more than those of the model.
    """
    try:
        model = PieceModel(path.read_bytes())
        own = dict(zip(_CONTROL, model.control(), strict=True)) if model.proto else {}
        bos, eos, pad = ((named or {}).get(key, own[key]) for key in _CONTROL)
        if eos is None:
            raise DataError("has no end of sequence: train it with eos_id, or name eos_token in a tokenizer_config.json beside it")
        adds_bos = bos is not None and config.get("add_bos_token", True) is True
        added = _added_tokens(model, config, beside, {token for token in (bos, eos, pad) if token is not None})
        vocabulary = tokenizer_json(model, added, bos if adds_bos else None, config.get("legacy") is True)
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error.strerror})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    # transformers' class for a kind of model would build the vocabulary anew, and not as tokenizer.json has it
    kept = {
        key: value for key, value in config.items() if key not in ("tokenizer_class", "auto_map", "vocab_file", "tokenizer_file")
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", **kept, "bos_token": bos, "eos_token": eos, "pad_token": pad,
        "add_bos_token": adds_bos, "clean_up_tokenization_spaces": False, _ENCODER: PIECES,
    }  # fmt: skip
    files = {name: content for name, content in beside.items() if not name.endswith(".model")} | {PIECES: model.content}
    return FoundTokenizer(vocabulary, bos, eos, pad, adds_bos, chat_template, TokenizerFolder(settings, files))


def _added_tokens(
    model: PieceModel, config: Mapping[str, Any], beside: Mapping[str, bytes], control: set[str]
) -> dict[int, dict[str, Any]]:
    """The tokens that the settings add to a SentencePiece model, and its pieces that they call special: id -> the token.

    Raises:
        DataError: settings that are not readable, or a special token that has no id.
    """
    try:
        added = {int(id): {"content": content} for content, id in json.loads(beside.get(_ADDED, b"{}")).items()}
        added |= {int(id): dict(token) for id, token in (config.get("added_tokens_decoder") or {}).items()}
        further = [config.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
        special = control.union(*({_token_text(t) for t in (f.values() if isinstance(f, dict) else f)} for f in further))
        if not all(isinstance(token["content"], str) and id >= 0 for id, token in added.items()):
            raise ValueError("an added token is not a text with an id")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{SETTINGS} or {_ADDED} beside it: the added tokens are not readable ({one_line(error)})") from error
    ids = {piece.piece: id for id, piece in enumerate(model.proto.pieces) if id not in added}
    ids |= {token["content"]: id for id, token in added.items()}
    for content in special:
        if content not in ids:
            raise DataError(f"token {content!r} of {SETTINGS} is no piece of the model, and added_tokens_decoder gives it no id")
        added.setdefault(ids[content], {"content": content})
    return {id: {**token, "special": bool(token.get("special")) or token["content"] in special} for id, token in added.items()}


def own_settings(bos: str | None, eos: str, pad: str | None, chat_template: str | None) -> TokenizerFolder:
    """The settings of a tokenizer that was made here, for transformers' AutoTokenizer and vLLM."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad,
        "add_bos_token": bos is not None, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return TokenizerFolder(config if chat_template is None else {**config, "chat_template": chat_template})


def _token_text(token: str | dict | None) -> str | None:
    """Control tokens are written as a string or as a serialised AddedToken."""
    return token["content"] if isinstance(token, dict) else token


def _read_chat_template(config: dict[str, Any], beside: Mapping[str, bytes]) -> str | None:
    """The Jinja text beside the tokenizer, else that in its config, where several are told apart by name."""
    if TEMPLATE in beside:
        return beside[TEMPLATE].decode("utf-8")
    template = config.get("chat_template")
    if template is None and "chat_template.json" in beside:
        template = json.loads(beside["chat_template.json"]).get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _piece_file(folder: Path) -> Path | None:
    """The SentencePiece model in a folder; None if there is none.

    Raises:
        DataError: there are several, or a tokenizer class counts its ids otherwise.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix == ".model" and path.is_file())
    chosen = folder / PIECES if folder / PIECES in found else (found[0] if len(found) == 1 else None)
    if found and chosen is None:
        raise DataError(f"{folder} has {', '.join(path.name for path in found)}: name one of them as data.tokenizer")
    return chosen


def _other_vocabulary(folder: Path) -> str | None:
    """What stands there instead of a vocabulary that is read, and what to do; None if nothing does."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".tiktoken" or (path.suffix == ".model" and _is_tiktoken(path)):
            return (
                f"{path.name}, a vocabulary of tiktoken, which this project does not read: make the file once with "
                f"transformers.convert_slow_tokenizer.TikTokenConverter(vocab_file={path.name!r}, pattern=..., "
                "extra_special_tokens=[...]).converted().save('tokenizer.json'), with pattern and special tokens as the model's "
                "own tokenization_*.py has them"
            )
        if path.name == "tekken.json":
            return f"{path.name}, a vocabulary of mistral-common, which this project does not read; {_MAKE_JSON}"
        if path.name == _SHIFTED:
            return f"{path.name}, whose ids transformers counts otherwise than SentencePiece; {_MAKE_JSON}"
    is_byte_level = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if is_byte_level and not any(path.suffix == ".model" for path in folder.iterdir()):
        return f"vocab.json and merges.txt, which this project does not read; {_MAKE_JSON}"
    return None


def _is_tiktoken(path: Path) -> bool:
    """Whether its first line is a token in base 64 and its rank; SentencePiece's files are protocol buffers."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(512)) is not None
