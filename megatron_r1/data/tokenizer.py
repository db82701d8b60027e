"""One wrapper over a Hugging Face `tokenizer.json`, strict about what may become a control token.

Methods for texts, from the least trusted: `encode_plain` (questions, documents: nothing becomes an added token), `encode_response`
(a given response: only <think> and the other tags are tokens), `encode` (every added token but the control tokens is a token) and
`encode_template` (the text of a template itself). Only code or a template places the beginning and the end of sequence.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from megatron_r1.data.chat.prompt_templates import render, split_prompt
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.architecture import Architecture
from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

#: General text: a word with the space before it, one Han character, up to three digits, a run of punctuation, space.
TEXT_PATTERN = r" ?\p{Han}| ?[\p{L}\p{M}]+|\d{1,3}| ?[^\p{L}\p{M}\d\s]+|\s+"
#: The tally: a word with the spaces around it, a signed digit and a number are one token each, so that sequences are short and
#: every step is two tokens.
TALLY_PATTERN = r" ?[A-Za-z]+ ?| ?\p{Han}|[+-]\d|\d+| ?[^\p{L}\d\s]+ ?|\s+"

_TAG = re.compile(f"({'|'.join(map(re.escape, TAGS))})")


class Tokenizer:
    """Text to ids and back. `bos_id` is None for vocabularies without one (Qwen2)."""

    def __init__(self, tokenizer_json: str, bos: str | None, eos: str, pad: str | None, chat_template: str | None = None):
        """Args: the text of a tokenizer.json, its control tokens (without `pad`, `eos` pads), the Jinja text of its chat template.

        Raises:
            DataError: not a tokenizer, or a control token that is not in the vocabulary.
        """
        try:
            self._with_tags = tokenizers.Tokenizer.from_str(tokenizer_json)
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(tokenizer_json), "added_tokens": []}))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer.json is not a tokenizer: {str(error).splitlines()[0]}") from error
        self._with_tags.encode_special_tokens = True  # control tokens in a text stay text
        self._json, self._pad = tokenizer_json, pad or eos
        self.bos, self.eos, self.chat_template = bos, eos, chat_template
        self.eos_id = self._control_id(self.eos)
        self.pad_id = self._control_id(self._pad)
        self.bos_id = None if bos is None else self._control_id(bos)
        self.vocab_size = max(self._with_tags.get_vocab(with_added_tokens=True).values()) + 1  #: highest id + 1
        self._control_ids = {self.eos_id, self.pad_id, self.bos_id}
        self._fixed_ids: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str | None, ...]]:
        return Tokenizer, (self._json, self.bos, self.eos, self._pad, self.chat_template)

    def _control_id(self, token: str) -> int:
        token_id = self._with_tags.token_to_id(token)
        if token_id is None:
            raise DataError(f"tokenizer: control token {token!r} is not in the vocabulary")
        return token_id

    @property
    def fingerprint(self) -> str:
        """Changes with anything that decides how a text or a conversation is encoded."""
        settings = json.dumps([self._json, self.bos, self.eos, self.chat_template])
        return hashlib.sha256(settings.encode()).hexdigest()

    @property
    def start_ids(self) -> list[int]:
        """What every sequence begins with: [bos_id], or nothing if the vocabulary has none."""
        return [] if self.bos_id is None else [self.bos_id]

    def encode_plain(self, text: str) -> list[int]:
        """Untrusted text: nothing in it becomes an added token, "<think>" is seven characters."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Text whose tags are tokens. "<eos>" and other control tokens written in it stay text."""
        return self._with_tags.encode(text, add_special_tokens=False).ids

    def encode_response(self, text: str) -> list[int]:
        """A given response: <think>, <answer> and their ends are tokens if the vocabulary has them, all else is plain text."""
        ids: list[int] = []
        for part in filter(None, _TAG.split(text)):
            ids += self.encode(part) if part in TAGS else self.encode_plain(part)
        return ids

    def encode_template(self, text: str) -> list[int]:
        """The text of a template itself: every added token in it becomes a token, control tokens too."""
        self._with_tags.encode_special_tokens = False
        try:
            return self._with_tags.encode(text, add_special_tokens=False).ids
        finally:
            self._with_tags.encode_special_tokens = True

    def encode_fixed(self, text: str) -> list[int]:
        """Like `encode_template`, for one of a few texts that come again and again."""
        if text not in self._fixed_ids:
            self._fixed_ids[text] = self.encode_template(text)
        return self._fixed_ids[text]

    def encode_prompt(self, template: str, question: str) -> tuple[str, list[int]]:
        """The rendered prompt and its ids, beginning of sequence included; the question is encoded as untrusted text.

        For conversations, and for a tokenizer's own template, see `chat_template`.
        """
        before, middle, after = split_prompt(template, question)
        token_ids = self.start_ids + self.encode_fixed(before) + self.encode_plain(middle) + self.encode_fixed(after)
        return render(template, question), token_ids

    def added_tokens(self) -> list[str]:
        """Every text that the vocabulary holds as one indivisible token: control tokens, turn markers, tags."""
        return [token.content for token in self._with_tags.get_added_tokens_decoder().values()]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Everything but beginning of sequence, end of sequence and padding; tags and other added tokens are shown."""
        return self._with_tags.decode([i for i in token_ids if i not in self._control_ids], skip_special_tokens=False)

    def decode_everything(self, token_ids: Sequence[int]) -> str:
        """Like `decode`, with beginning of sequence, end of sequence and padding shown."""
        return self._with_tags.decode(list(token_ids), skip_special_tokens=False)

    def with_chat_template(self, chat_template: str) -> Tokenizer:
        """The same vocabulary, saved with this Jinja text, which transformers and servers render conversations with."""
        return Tokenizer(self._json, self.bos, self.eos, self._pad, chat_template)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer and vLLM load.

        Raises:
            DataError: the folder cannot be written.
        """
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.bos, "eos_token": self.eos, "pad_token": self._pad,
            "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (("tokenizer.json", self._json), ("tokenizer_config.json", json.dumps(config, indent=2) + "\n")):
                temporary = folder / f".{name}.{os.getpid()}"
                temporary.write_text(text, encoding="utf-8")
                temporary.rename(folder / name)
        except OSError as error:
            raise DataError(f"{folder}: cannot write the tokenizer ({error.strerror})") from error

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder with tokenizer.json and tokenizer_config.json.

        Raises:
            DataError: a missing or malformed file, named.
        """
        folder = Path(folder)
        texts = {}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            try:
                texts[name] = (folder / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{folder / name}: cannot read the tokenizer ({error}); make one with tools/train_tokenizer.py"
                ) from error
        try:
            config = json.loads(texts["tokenizer_config.json"])
            bos, eos, pad = (_token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token"))
            chat_template = _read_chat_template(folder, config)
        except (ValueError, AttributeError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{folder / 'tokenizer_config.json'}: not a tokenizer config ({error})") from error
        if eos is None:
            raise DataError(f"{folder / 'tokenizer_config.json'}: eos_token is missing")
        try:
            return cls(texts["tokenizer.json"], bos, eos, pad, chat_template)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error


def _token_text(token: str | dict | None) -> str | None:
    """Control tokens are written as a string or as a serialised AddedToken."""
    return token["content"] if isinstance(token, dict) else token


def _read_chat_template(folder: Path, config: dict) -> str | None:
    """The Jinja text beside the tokenizer, else that in its config, where several are told apart by name."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, pattern: str = TEXT_PATTERN, single_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Byte-level BPE: ids 0, 1, 2 are padding, beginning and end of sequence, then the tags, then `single_tokens`.

    Args:
        texts: training texts, without tags or `single_tokens`.
        vocab_size: upper bound; a small corpus may give fewer tokens.
        pattern: what one token can at most span, as a regular expression.
        single_tokens: whole texts that become one token each. With the two fixed texts of the R1-Zero template here, the template
            is used word for word and costs 2 tokens: a tiny model cannot afford 110 tokens of prompt.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes and the added tokens.
    """
    added = (PAD, BOS, EOS, *TAGS, *single_tokens)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(added) + len(alphabet):
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: {len(alphabet)} bytes and {len(added)} added tokens need "
            f"{len(added) + len(alphabet)}"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in added]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in (
            PAD,
            BOS,
            EOS,
        )  # the trainer calls all of them special, which hides tags in decoding
    return Tokenizer(json.dumps(state, ensure_ascii=False, indent=2), BOS, EOS, PAD)


def check_tokenizer_fits(tokenizer: Tokenizer, architecture: Architecture) -> None:
    """Every id of the tokenizer has a row in the embedding.

    Raises:
        ConfigError: the tokenizer is larger than the model's vocabulary.
    """
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {architecture.vocab_size};"
            " set model.overrides.vocab_size or take another data.tokenizer"
        )
