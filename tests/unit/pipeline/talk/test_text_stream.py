"""Tokens become text piece by piece: the same text, whole characters, nothing that the terminal would obey."""

from __future__ import annotations

import random

import pytest

from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.pipeline.talk.text_stream import ReasoningShade, TokenText, show_safely
from tests.sentence_pieces import KINDS as SENTENCE_PIECES
from tests.sentence_pieces import train

TEXTS = ["", "plain", "12 + 30 = 42", "日本語 и ещё 👩‍👩‍👧 \ufffd end", "é" * 40, "<think>\na</think>b", "\x1b[31m \r\n"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("most", [1, 2, 7])
def test_the_pieces_are_the_whole(text, most):
    tokenizer = train_tokenizer(["a few words"], 300)
    ids = tokenizer.encode_response(text)
    stream, pieces, dice = TokenText(tokenizer.decode), [], random.Random(most)
    while ids:
        size = dice.randint(1, most)
        pieces.append(stream.add(ids[:size]))
        ids = ids[size:]
    pieces.append(stream.add([], is_last=True))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("kind", SENTENCE_PIECES)
def test_spaces_and_bytes_of_sentence_pieces_come_as_in_the_whole(kind, tmp_path):
    """A model that joins spaces drops those before a text, and none inside of it."""
    (tmp_path / "own.model").write_bytes(train(**SENTENCE_PIECES[kind]))
    tokenizer, dice = Tokenizer.load(tmp_path / "own.model"), random.Random(kind)
    names = ["\u2581", "\u2581\u2581", "<0xE6>", "<0x97>", "<0xA5>", "<0x20>", "</s>", "<think>"]
    chosen = [id for name in names if (id := tokenizer.find_token(name)) is not None]
    for number in range(200):
        ids = [dice.choice(chosen) if dice.random() < 0.6 else dice.randrange(tokenizer.vocab_size) for _ in range(12)]
        ids = [chosen[0]] * 60 + ids if number == 0 else ids[:6] + [chosen[0]] * 60 + ids if number == 1 else ids
        stream = TokenText(tokenizer.decode)
        pieces = [stream.add([id]) for id in ids]
        assert "".join(pieces) + stream.add([], is_last=True) == tokenizer.decode(ids)


def test_bytes_that_are_no_character_do_not_hold_back_the_rest():
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return "".join("\ufffd" if token == 0 else "x" for token in ids)

    stream = TokenText(decode)
    said = [stream.add([0]) for _ in range(40)]
    assert "".join(said) + stream.add([], is_last=True) == "\ufffd" * 40 and any(said)
    assert max(calls) <= 33, "a token costs more the longer the response is"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"), ("\x9b31m", r"\x9b31m"), ("a\rb", r"a\rb"), ("\x07\x08\x7f\x00", r"\x07\x08\x7f\x00"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"), ("\u200b\ufeff\u2028\u2029", r"\u200b\ufeff\u2028\u2029"),
        ("\ud800", r"\ud800"), ("\U000e0041", r"\U000e0041"), ("a\n\tb", "a\n\tb"), ("\u00a0\u3000", "\u00a0\u3000"),
        ("👩\u200d👧 日本 é", "👩\u200d👧 日本 é"), (r"\x1b", r"\x1b"),
    ],
)  # fmt: skip
def test_what_would_move_the_cursor_is_escaped(text, shown):
    assert show_safely(text) == shown


@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning_is_dimmed_wherever_its_tags_are_cut(size):
    text = "a <b> <think>1 < 2\x1b</think>7 </think> <thi"
    shade = ReasoningShade(True)
    shown = "".join(shade.add(text[start : start + size]) for start in range(0, len(text), size)) + shade.end()
    assert shown == "a <b> \x1b[2m<think>1 < 2\\x1b</think>\x1b[0m7 </think> <thi"


def test_reasoning_that_does_not_end_leaves_the_terminal_plain():
    shade = ReasoningShade(True)
    assert shade.add("<think>x") + shade.end() == "\x1b[2m<think>x\x1b[0m"
    plain = ReasoningShade(False)
    assert plain.add("<think>x\x1b") + plain.end() == "<think>x\\x1b"
