"""The files of a tokenizer in a folder: what is read of them, what goes with a model, and what is said of other kinds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError

VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SPECIAL = "special_tokens_map.json"
#: what else belongs to a tokenizer and goes where it goes
_BESIDE = (
    _SPECIAL, TEMPLATE, "added_tokens.json", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json",
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
    """Read tokenizer.json, tokenizer_config.json and what stands beside them.

    Raises:
        DataError: a missing or malformed file, named; of another kind of vocabulary, how to make a tokenizer.json of it.
    """
    if folder.is_dir() and not (folder / VOCABULARY).is_file() and (kind := _other_vocabulary(folder)):
        raise DataError(f"{folder} has no {VOCABULARY} but {kind}")
    texts = {}
    for name in (VOCABULARY, SETTINGS):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{folder / name}: cannot read the tokenizer ({error}); make one with tools/train_tokenizer.py"
            ) from error
    try:
        config = json.loads(texts[SETTINGS])
        beside = {name: (folder / name).read_bytes() for name in _BESIDE if (folder / name).is_file()}
        special = json.loads(beside[_SPECIAL]) if _SPECIAL in beside else {}
        bos, eos, pad = (_token_text(config[key] if key in config else special.get(key)) for key in _CONTROL)
        chat_template = _read_chat_template(config, beside)
        says = config.get("add_bos_token")
    except (ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{folder / SETTINGS}: not a tokenizer config ({error})") from error
    if eos is None:
        raise DataError(f"{folder / SETTINGS}: eos_token is missing")
    if says is not None and not isinstance(says, bool):
        raise DataError(f"{folder / SETTINGS}: add_bos_token is {says!r}, it must be true or false")
    if says is None and set(config) <= _EARLIER_KEYS:
        says = True
    return FoundTokenizer(texts[VOCABULARY], bos, eos, pad, says, chat_template, TokenizerFolder(config, beside))


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


def _other_vocabulary(folder: Path) -> str | None:
    """What stands there instead of tokenizer.json, and what to do; None if no vocabulary does."""
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
        if path.suffix == ".model":
            return f"{path.name}, a vocabulary of SentencePiece, which this project does not read; {_MAKE_JSON}"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return f"vocab.json and merges.txt, which this project does not read; {_MAKE_JSON}"
    return None


def _is_tiktoken(path: Path) -> bool:
    """Whether its first line is a token in base 64 and its rank; SentencePiece's files are protocol buffers."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(512)) is not None
