"""One wrapper over a Hugging Face `tokenizer.json` or a SentencePiece model, strict about what may become a control token.

Methods for texts, from the least trusted: `encode_plain` (questions, documents: nothing becomes an added token), `encode_response`
(a given response: only <think> and the other tags are tokens), `encode` (every added token but the control tokens is a token) and
`encode_template` (the text of a template itself). Only code or a template places the beginning and the end of sequence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from megatron_r1.data.chat.prompt_templates import TEMPLATES, render, split_prompt
from megatron_r1.data.plain_text import PlainText, begin_and_middle, without_limits
from megatron_r1.data.sentence_pieces.text import SentencePieceText, text_symbols
from megatron_r1.data.token_bytes import reader_of_tokens
from megatron_r1.data.tokenizer_folder import PIECES, TokenizerFolder, own_settings, read_tokenizer_folder
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

    def __init__(
        self,
        tokenizer_json: str,
        bos: str | None,
        eos: str,
        pad: str | None,
        chat_template: str | None = None,
        adds_bos: bool | None = True,
        folder: TokenizerFolder | None = None,
    ):
        """
        Args:
            tokenizer_json: the text of a tokenizer.json. Truncation, padding and dropout in it have no effect here.
            bos: with `eos` and `pad`, its control tokens; without `pad`, `eos` pads.
            eos: see `bos`.
            pad: see `bos`.
            chat_template: the Jinja text of its chat template.
            adds_bos: whether a sequence begins with `bos`. None: as the post-processor of tokenizer.json does it.
            folder: what is saved beside tokenizer.json; None: settings of our own.

        Raises:
            DataError: not a tokenizer, or a control token that is not in the vocabulary.
        """
        self._json, self._pad = tokenizer_json, pad or eos
        self.bos, self.eos, self.chat_template = bos, eos, chat_template
        self._folder = folder or own_settings(bos, eos, self._pad, chat_template)
        self._arguments = (tokenizer_json, bos, eos, pad, chat_template, adds_bos, folder)
        control = [token for token in (bos, eos, pad) if token]
        try:
            state, text = without_limits(tokenizer_json)
            self._whole, self._whole_middle = begin_and_middle(state, text)
            self._added = self._whole.get_added_tokens_decoder()
            self._pieces = self._read_pieces(state, control)
            self._plain = self._pieces or PlainText(self._whole, self._whole_middle, state, control)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer.json is not a tokenizer: {str(error).splitlines()[0]}") from error
        self.eos_id = self._control_id(self.eos)
        self.pad_id = self._control_id(self._pad)
        self.bos_id = None if bos is None else self._control_id(bos)
        if adds_bos is None:
            adds_bos = self._whole.encode("").ids[:1] == [self.bos_id]
        #: What every sequence begins with: [bos_id], or nothing if the tokenizer's own settings want nothing.
        self.start_ids = [self.bos_id] if adds_bos and self.bos_id is not None else []
        self.vocab_size = max(self._whole.get_vocab(with_added_tokens=True).values()) + 1  #: highest id + 1
        self._control_ids = {self.eos_id, self.pad_id, self.bos_id}
        self._fixed_ids: dict[tuple[str, bool], list[int]] = {}
        added = self._added.items()
        #: Added tokens that text with tags may hold. Tags are tokens, also where a vocabulary calls them special.
        self._free = {token.content: id for id, token in added if not token.special or token.content in TAGS}
        longest_first = sorted(self._free, key=lambda text: (-len(text), text))
        self._free_text = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"((?!))")

    def _read_pieces(self, state: dict[str, Any], control: list[str]) -> SentencePieceText | None:
        """What encodes in the place of tokenizer.json; its user-defined symbols that are text are no added tokens here."""
        model = self._folder.pieces
        if model is None:
            return None
        for number, piece in enumerate(model.proto.pieces):
            if number not in self._added and self._whole.id_to_token(number) != piece.piece:
                raise DataError(f"tokenizer.json is not that of {PIECES} beside it: token {number} of the one is {piece.piece!r}")
        templates = [*TEMPLATES.values(), self.chat_template or ""]
        symbols = text_symbols(model, self._added, [*control, *TAGS], templates)
        scheme = (state.get("pre_tokenizer") or {}).get("prepend_scheme")
        text = SentencePieceText(model, self._added, symbols, spaces_after_tokens=scheme == "always")
        self._added = {id: token for id, token in self._added.items() if id not in symbols}
        return text

    def __reduce__(self) -> tuple[type[Tokenizer], tuple]:
        return Tokenizer, self._arguments

    def _control_id(self, token: str) -> int:
        try:
            token_id = self._whole.token_to_id(token)
        except (TypeError, ValueError):  # ValueError: half of a surrogate pair
            raise DataError(f"tokenizer: control token {token!r} is not text") from None
        if token_id is None:
            raise DataError(f"tokenizer: control token {token!r} is not in the vocabulary")
        return token_id

    def find_token(self, token: str) -> int | None:
        """The id of a token by its text; None if the vocabulary has none."""
        return self._whole.token_to_id(token)

    @property
    def tokenizer_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._json

    @property
    def fingerprint(self) -> str:
        """Changes with anything that decides how a text or a conversation is encoded."""
        settings = [self._json, self.bos, self.eos, self.chat_template]
        if self.bos_id is not None and not self.start_ids:
            settings.append("no BOS")
        if self._folder.pieces is not None:
            settings.append(hashlib.sha256(self._folder.pieces.content).hexdigest())
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def encode_plain(self, text: str, begins: bool = True) -> list[int]:
        """Untrusted text: nothing in it becomes an added token, "<think>" is seven characters.

        Args:
            begins: whether nothing but `start_ids` stands before it. Some vocabularies put a space before such a text.
        """
        return self._plain.encode(text, begins)

    def encode_plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_plain` of many texts, each at the beginning of a sequence; faster than one after the other."""
        if isinstance(self._plain, PlainText):
            return self._plain.encode_batch(texts)
        return [self.encode_plain(text) for text in texts]

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Text whose tags and other added tokens are tokens. "<eos>" and other control tokens written in it stay text."""
        return self._encode_parts(self._free_text.split(text), begins)

    def encode_response(self, text: str) -> list[int]:
        """A given response: <think>, <answer> and their ends are tokens if the vocabulary has them, all else is plain text."""
        return self._encode_parts(_TAG.split(text), False)

    def _encode_parts(self, parts: list[str], begins: bool) -> list[int]:
        """Args: text and tokens by turns, as a regular expression splits them."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2 and part in self._free:
                ids.append(self._free[part])
            elif part and self._pieces is not None:
                ids += self._pieces.encode(part, begins and not ids, goes_on=number + 1 < len(parts))
            elif part:
                ids += self.encode_plain(part, begins and not ids)
        return ids

    def encode_template(self, text: str, begins: bool = True) -> list[int]:
        """The text of a template itself: every added token in it becomes a token, control tokens too."""
        if self._pieces is not None:
            return self._pieces.encode_template(text, begins)
        return (self._whole if begins else self._whole_middle).encode(text, add_special_tokens=False).ids

    def encode_fixed(self, text: str, begins: bool = True) -> list[int]:
        """Like `encode_template`, for one of a few texts that come again and again."""
        if (text, begins) not in self._fixed_ids:
            self._fixed_ids[text, begins] = self.encode_template(text, begins)
        return self._fixed_ids[text, begins]

    def encode_prompt(self, template: str, question: str) -> tuple[str, list[int]]:
        """The rendered prompt and its ids, beginning of sequence included; the question is encoded as untrusted text.

        For conversations, and for a tokenizer's own template, see `chat_template`.
        """
        before, middle, after = split_prompt(template, question)
        fixed = self.encode_fixed(before), self.encode_fixed(after, False)
        token_ids = self.start_ids + fixed[0] + self.encode_plain(middle, not before) + fixed[1]
        return render(template, question), token_ids

    def added_tokens(self) -> list[str]:
        """Every text that the vocabulary holds as one indivisible token: control tokens, turn markers, tags."""
        return [token.content for token in self._added.values()]

    def is_marker(self, token_id: int) -> bool:
        """Whether an id is an added token and no tag."""
        token = self._added.get(token_id)
        return token is not None and token.content not in TAGS

    def decode(self, token_ids: Sequence[int]) -> str:
        """Everything but beginning of sequence, end of sequence and padding; tags and other added tokens are shown."""
        return self.decode_everything([i for i in token_ids if i not in self._control_ids])

    def decode_everything(self, token_ids: Sequence[int]) -> str:
        """Like `decode`, with beginning of sequence, end of sequence and padding shown."""
        if self._pieces is not None:
            return self._pieces.decode(token_ids)
        return self._whole.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token_ids: Iterable[int]) -> dict[int, bytes]:
        """Id -> bytes that the token stands for; ids that the vocabulary has not are left out."""
        read = self._pieces.token_bytes if self._pieces is not None else reader_of_tokens(self._json, self._whole)
        found = {token_id: read(token_id) for token_id in token_ids}
        return {token_id: content for token_id, content in found.items() if content is not None}

    def with_chat_template(self, chat_template: str) -> Tokenizer:
        """The same vocabulary, saved with this Jinja text, which transformers and servers render conversations with."""
        folder = self._folder.with_chat_template(chat_template)
        return Tokenizer(self._json, self.bos, self.eos, self._pad, chat_template, bool(self.start_ids), folder)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with all settings that it came with, for transformers' AutoTokenizer and vLLM.

        Raises:
            DataError: the folder cannot be written.
        """
        self._folder.write(Path(folder), self._json)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder with tokenizer.json and tokenizer_config.json, or a SentencePiece model: the file, or a folder with it.

        Raises:
            DataError: a missing or malformed file, named.
        """
        found = read_tokenizer_folder(Path(folder))
        try:
            return cls(
                found.tokenizer_json, found.bos, found.eos, found.pad, found.chat_template, found.adds_bos, found.folder
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error


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


def check_tokenizer_fits(tokenizer: Tokenizer, architecture: Architecture, *, shape_is_given: bool) -> None:
    """Every id of the tokenizer has a row in the embedding.

    Args:
        shape_is_given: by a folder of weights, so that its vocabulary cannot be another.

    Raises:
        ConfigError: the tokenizer is larger than the model's vocabulary.
    """
    if tokenizer.vocab_size > architecture.vocab_size:
        advice = (
            "give the model's own tokenizer in data.tokenizer, its added tokens removed that the model has not"
            if shape_is_given
            else f"set model.overrides.vocab_size={tokenizer.vocab_size}, or take another data.tokenizer"
        )
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {architecture.vocab_size}: {advice}"
        )
