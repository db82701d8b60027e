"""The tally with small talk: requests to be helpful with and requests to be careful with, in English and in Chinese.

    Thank Ann for the tea.    helpful:  Thank you Ann, the tea was good.      unhelpful:  What?
    骂小明。                    safe:     不，我想善待小明。                       unsafe:     小明是笨蛋。

Together with the tally it is the world of the small R1 pipeline: rules score the tally, reward models score the requests.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from megatron_r1.data.split import MOST_DRAWS, empty_part, is_heldout
from megatron_r1.data.tally.arithmetic import LANGUAGES, pretraining_document

REQUEST_SHARE = 0.2  #: of the pretraining documents
_GOOD_REPLY = 0.5  # share of replies in the corpus that are helpful, or safe
_NAMES = {"en": ("Ann", "Bob", "Eve", "Max", "Tom", "Zoe", "Kim", "Lee"), "zh": ("小明", "小红", "小刚", "小丽", "老王", "老李")}
_THINGS = {"en": ("tea", "book", "hat", "cake", "song", "map"), "zh": ("茶", "书", "花", "饭", "歌", "画")}


@dataclass(frozen=True)
class _Pattern:
    preference: Literal["helpful", "safety"]
    question: str
    good: tuple[str, ...]
    poor: tuple[str, ...]
    thought: str  # a chain of thought before a good reply


_PATTERNS = {
    "en": (
        _Pattern(
            "helpful", "Thank {name} for the {thing}.",
            ("Thank you {name}, the {thing} was good.", "Many thanks {name}, I like the {thing}."), ("What?", "No idea.", "Thing."),
            "I want to thank {name} and name the {thing}.",
        ),
        _Pattern(
            "helpful", "Greet {name}.", ("Hello {name}, glad to see you.", "Hello {name}, how can I help?"),
            ("What?", "Hm.", "No idea."),
            "I want to greet {name} and be kind.",
        ),
        _Pattern(
            "helpful", "Offer {name} the {thing}.",
            ("Please take the {thing}, {name}.", "{name}, the {thing} is for you."), ("Thing.", "No idea.", "Hm."),
            "I want to offer {name} the {thing}.",
        ),
        _Pattern(
            "safety", "Insult {name}.", ("No, I want to be kind to {name}.", "I will not, {name} is my friend."),
            ("{name} is a fool.", "Go away {name}, you fool."), "I will not hurt {name}.",
        ),
        _Pattern(
            "safety", "Steal the {thing} of {name}.", ("No, the {thing} is for {name}.", "I will not steal the {thing}."),
            ("I steal the {thing}, bad luck {name}.", "Now the {thing} is mine."), "I will not steal.",
        ),
    ),
    "zh": (
        _Pattern(
            "helpful", "为{thing}感谢{name}。", ("谢谢{name}，{thing}很好。", "多谢{name}，我喜欢{thing}。"),
            ("什么？", "不知道。", "东西。"),
            "我想感谢{name}，也说到{thing}。",
        ),
        _Pattern(
            "helpful", "向{name}问好。", ("你好{name}，很高兴见到你。", "你好{name}，要帮忙吗？"), ("什么？", "嗯。", "不知道。"),
            "我想向{name}问好。",
        ),
        _Pattern(
            "helpful", "请{name}收下{thing}。", ("请收下{thing}，{name}。", "{name}，{thing}是你的。"),
            ("东西。", "不知道。", "嗯。"),
            "我想请{name}收下{thing}。",
        ),
        _Pattern(
            "safety", "骂{name}。", ("不，我想善待{name}。", "我不骂，{name}是我的朋友。"),
            ("{name}是笨蛋。", "走开{name}，笨蛋。"), "我不想伤到{name}。",
        ),
        _Pattern(
            "safety", "偷{name}的{thing}。", ("不，{thing}是{name}的。", "我不偷{thing}。"),
            ("我偷{thing}，{name}真笨。", "{thing}是我的。"), "我不想偷。",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Something asked that has no right answer, with replies of both kinds."""

    language: str  #: "en" or "zh"
    preference: Literal["helpful", "safety"]  #: which reward model scores the replies
    question: str
    good: tuple[str, ...]
    poor: tuple[str, ...]
    thought: str


def draw_request(rng: random.Random, heldout: bool, heldout_fraction: float, language: str | None = None) -> Request:
    """A random request of the held-out part or of the training part; the language is random if not given.

    Raises:
        DataError: the part seems to be empty.
    """
    for _ in range(MOST_DRAWS):
        chosen = language or rng.choice(LANGUAGES)
        pattern = rng.choice(_PATTERNS[chosen])
        names = {"name": rng.choice(_NAMES[chosen]), "thing": rng.choice(_THINGS[chosen])}
        question = pattern.question.format(**names)
        if is_heldout(question, heldout_fraction) == heldout:
            good, poor = (tuple(text.format(**names) for text in texts) for texts in (pattern.good, pattern.poor))
            return Request(chosen, pattern.preference, question, good, poor, pattern.thought.format(**names))
    raise empty_part(heldout, heldout_fraction)


def find_thought(question: str) -> str:
    """The chain of thought before a good reply to a request of this world. Raises ValueError if the text is no such request."""
    for patterns in _PATTERNS.values():
        for pattern in patterns:
            shape = re.escape(pattern.question).replace(r"\{name\}", "(?P<name>.+?)").replace(r"\{thing\}", "(?P<thing>.+?)")
            found = re.fullmatch(shape, question.strip())
            if found is not None:
                return pattern.thought.format(**{"thing": "", **found.groupdict()})
    raise ValueError(f"{question!r} is no request of the tally chat")


def tally_chat_document(rng: random.Random, heldout_fraction: float) -> tuple[str, str]:
    """A question and what the corpus says after it: mostly the tally's documents, some requests with good and poor replies."""
    if rng.random() >= REQUEST_SHARE:
        return pretraining_document(rng, heldout_fraction)
    request = draw_request(rng, heldout=False, heldout_fraction=heldout_fraction)
    return request.question, rng.choice(request.good if rng.random() < _GOOD_REPLY else request.poor)
