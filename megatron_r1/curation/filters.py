"""The filters of supervised data, each with a name, and the first that a record fails.

The recipe drops samples that are wrong, mix languages, repeat themselves, have long paragraphs or blocks of code in their reasoning
(R1 v1 (arXiv) section 2.3.3, R1 v2 B.3.3); cold-start data also has no markdown in its thinking and begins in the first person (R1
v2 B.3.2).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_r1.config.curation import FilterConfig
from megatron_r1.curation.forms import Form
from megatron_r1.curation.records import Conversation
from megatron_r1.curation.words import hash_ngrams, words_of
from megatron_r1.rewards.language.scorer import LANGUAGES, MAX_CHARACTERS, OTHER, count_words

_FENCE = re.compile(r"^[ \t]*(```|~~~)|```", re.MULTILINE)
_MARKDOWN = {
    "a heading": re.compile(r"^ {0,3}#{1,6} +\S", re.MULTILINE),
    "bold type": re.compile(r"(?<![\w*])\*\*(?=[^\s*])[^*\n]{1,200}(?<=[^\s*])\*\*(?![\w*])"),
    "a bulleted list": re.compile(r"^[ \t]*[-*+] +(?=[^\W\d_])", re.MULTILINE),  # `- 5 + x` is arithmetic
    "a table": re.compile(r"^[ \t]*\|[ \t:|-]*--[ \t:|-]*\|[ \t]*$", re.MULTILINE),
}
_NOT_LATIN = {"zh", "ja", "ko", "ru", OTHER}  #: labels of words in other scripts
#: language -> words of the first person; a language without an entry is let through
_FIRST_PERSON = {
    "en": frozenset(["i", "we", "me", "us", "my", "our", "let"]),  # "let": of "let me" and "let's"
    "zh": frozenset("我咱"),  # 我, 我们, 让我们, 咱们
}


class FilteredTurn(NamedTuple):
    """One answer of a conversation, as a filter sees it."""

    question: str
    reasoning: str | None
    summary: str
    domain: str
    language: str
    outcome: str | None  #: of the record's verdict; None if it has no verdict


@dataclass(frozen=True)
class Rejection:
    """Why a record is dropped."""

    name: str  #: of the filter
    detail: str  #: one line


Filter = Callable[[FilteredTurn, FilterConfig], str | None]  #: why a turn is dropped; None: it is not


def first_failure(conversation: Conversation, config: FilterConfig, form: Form) -> Rejection | None:
    """The first of the config's filters that a turn of the conversation fails; None if it passes all of them.

    A record's verdict is what `megatron-r1 score` and rejection sampling write: its field `outcome`.
    """
    turns = []
    for question, content in conversation.turns:
        answer = form.split(content)
        if answer is None:
            if "well_formed" in config.names:
                return Rejection("well_formed", "the answer is not reasoning and summary in the form's marks")
            continue
        outcome = conversation.fields.get("outcome")
        turns.append(FilteredTurn(question, *answer, conversation.domain, conversation.language, outcome))
    for name, check in FILTERS.items():
        if name in config.names:
            detail = next((why for turn in turns if (why := check(turn, config)) is not None), None)
            if detail is not None:
                return Rejection(name, detail)
    return None


def _has_reasoning(turn: FilteredTurn, config: FilterConfig) -> str | None:
    if turn.reasoning is None and turn.domain not in config.plain_domains:
        return f"no reasoning, and domain {turn.domain} is not in plain_domains"
    return None


def _is_correct(turn: FilteredTurn, config: FilterConfig) -> str | None:
    if turn.outcome is None:
        return f"no verdict, which domain {turn.domain} needs" if turn.domain in config.verdict_domains else None
    return None if turn.outcome == "correct" else f"the verdict is {turn.outcome}"


def _is_one_language(turn: FilteredTurn, config: FilterConfig) -> str | None:
    """The language is the record's, else the question's, else the answer's own: the one that most of its words are in.

    A part without words (a formula, a number) is in no other language and passes. One word of another language in the same script
    may be a name, and is not counted against a part.
    """
    parts = {"reasoning": turn.reasoning or "", "summary": turn.summary}
    if any(len(text) > MAX_CHARACTERS for text in parts.values()):
        return "too long to find its language"
    counts = {name: count_words(text) for name, text in parts.items()}
    language = turn.language.lower().replace("_", "-").partition("-")[0]
    if not language:
        words = count_words(turn.question[:MAX_CHARACTERS]) or counts["reasoning"] + counts["summary"]
        language = max(words, key=lambda known: (words[known], known)) if words else ""
    elif language not in LANGUAGES:
        return f"unknown language {turn.language!r:.40}"
    for name, words in counts.items():
        names = 1 if _foreign_latin_words(words, language) == 1 else 0
        if words and words[language] < config.language_share * (words.total() - names):
            return f"{words[language]} of {words.total()} words of the {name} are {language}"
    return None


def _foreign_latin_words(words: Counter[str], language: str) -> int:
    """Words in Latin script that are not in this language, where it has that script."""
    return 0 if language in _NOT_LATIN else sum(words[other] for other in words.keys() - _NOT_LATIN - {language})


def _is_not_repetitive(turn: FilteredTurn, config: FilterConfig) -> str | None:
    text = f"{turn.reasoning or ''}\n{turn.summary}"
    ngrams = hash_ngrams(words_of(text), config.repetition_ngram)
    share = 1 - np.unique(ngrams).size / ngrams.size if ngrams.size else 0.0
    if share > config.repeated_ngram_share:
        return f"{share:.0%} of the {config.repetition_ngram}-grams stood before"
    seen: set[str] = set()
    repeated = total = 0
    for line in filter(None, map(str.strip, text.split("\n"))):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    if repeated > config.repeated_line_share * total:
        return f"{repeated / total:.0%} of the characters are in lines that stood before"
    return None


def _has_short_paragraphs(turn: FilteredTurn, config: FilterConfig) -> str | None:
    for paragraph in _reasoning_lines(turn):
        if len(paragraph) > config.paragraph_words:  # there are no more words than characters
            words = len(words_of(paragraph))
            if words > config.paragraph_words:
                return f"a paragraph of {words} words in the reasoning"
    return None


def _has_no_code_block(turn: FilteredTurn, config: FilterConfig) -> str | None:
    return "a block of code in the reasoning" if _FENCE.search(turn.reasoning or "") else None


def _has_no_markdown(turn: FilteredTurn, config: FilterConfig) -> str | None:
    for name, pattern in _MARKDOWN.items():
        if pattern.search(turn.reasoning or ""):
            return f"{name} in the reasoning"
    return None


def _begins_in_first_person(turn: FilteredTurn, config: FilterConfig) -> str | None:
    if turn.reasoning is None:
        return None
    words = words_of(turn.reasoning[: 20 * config.first_person_words])[: config.first_person_words]
    language = turn.language.lower()[:2] or ("zh" if any("\u4e00" <= word <= "\u9fff" for word in words) else "en")
    if language in _FIRST_PERSON and _FIRST_PERSON[language].isdisjoint(words):
        return f"none of the first {config.first_person_words} words is in the first person"
    return None


def _reasoning_lines(turn: FilteredTurn) -> Iterator[str]:
    yield from (turn.reasoning or "").split("\n")


#: in the order in which they are applied: the cheap ones that say most come first
FILTERS: dict[str, Filter] = {
    "well_formed": _has_reasoning,
    "correct": _is_correct,
    "language": _is_one_language,
    "repetition": _is_not_repetitive,
    "long_paragraph": _has_short_paragraphs,
    "code_block": _has_no_code_block,
    "markdown": _has_no_markdown,
    "first_person": _begins_in_first_person,
}
