"""Language-consistency reward: target-language words over all words of the reasoning (R1 v2 (arXiv) equation 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from megatron_r1.rewards.language.latin import label_words
from megatron_r1.rewards.language.text import Word, prose_of, reasoning_of, sentences_of
from megatron_r1.rewards.protocol import Verdict

LANGUAGES = ("en", "zh", "ja", "ko", "de", "fr", "es", "ru")
OTHER = "other"  #: a word of a language that is not counted by name

MAX_CHARACTERS = 500_000  #: of reasoning; the recipe's longest response, 65,536 tokens, is about half of it
_JAPANESE_KANA_SHARE = 0.15  #: of a sentence's Chinese characters and kana; Chinese quotes a kana now and then
_LONGEST_HANJA = 2  #: Chinese characters in a row that Korean newspapers write, as in 前
_LONGEST_CHUNK = 64  #: characters for a segmenter at once: jieba's time grows with the square of a run
_FEWEST_WORDS = 2  #: in a reasoning; fewer count as this many
_RUSSIAN = frozenset("абвгдеёжзийклмнопрстуфхцчшщъыьэюя\u0301")


class LanguageScorer:
    """The share of the reasoning's words that are in the target language.

    Code, numbers, formulas, acronyms and names of variables do not count. Reasoning without words has a share of 0, since there is
    nothing to reward; for the same reason a single word is counted as if there were two. The verdict is "correct" from `threshold`;
    the score is the share itself.
    """

    name = "language"

    def __init__(self, threshold: float = 0.9):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected a share above 0")
        self._threshold = threshold

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`; the reference is a language such as "en" or "zh-CN"."""
        language = reference.lower().replace("_", "-").partition("-")[0] if isinstance(reference, str) else None
        if language not in LANGUAGES:
            return Verdict(None, "unscorable", f"no target language: {reference!r:.40}, expected one of {', '.join(LANGUAGES)}")
        reasoning = reasoning_of(response)
        if len(reasoning) > MAX_CHARACTERS:
            return Verdict(0.0, "wrong", "the reasoning is too long to be one")
        words = count_words(reasoning)
        share = words[language] / max(words.total(), _FEWEST_WORDS)
        outcome = "correct" if share >= self._threshold else "wrong"
        return Verdict(share, outcome, f"{words[language]} of {words.total()} words are {language}", {"words": dict(words)})


def count_words(text: str) -> Counter[str]:
    """How many words of a text are in each language. What is no word does not count."""
    sentences = list(sentences_of(prose_of(text)))
    counts: Counter[str] = Counter()
    kana_somewhere = any(_kana_share(sentence) >= _JAPANESE_KANA_SHARE for sentence in sentences)
    latin = []
    for sentence in sentences:
        latin.append([word.text for word in sentence if word.script == "latin"])
        _count_other_scripts(sentence, kana_somewhere, counts)
    for labels in label_words(latin):
        counts.update(labels)
    return +counts  # without zeros


def _count_other_scripts(sentence: list[Word], kana_somewhere: bool, counts: Counter[str]) -> None:
    scripts = Counter(word.script for word in sentence)
    kana_share = _kana_share(sentence) if scripts["cjk"] else 0.0
    for script, text in sentence:
        if script == "hangul":
            counts["ko"] += 1
        elif script == "cyrillic":
            counts["ru" if _RUSSIAN.issuperset(text.lower()) else OTHER] += 1
        elif script in ("other", "broken"):
            counts[OTHER] += 1
        elif script == "cjk":
            if scripts["hangul"] > scripts["cjk"] and len(text) <= _LONGEST_HANJA and not _has_kana(text):
                counts["ko"] += 1
            elif kana_share >= _JAPANESE_KANA_SHARE or (not kana_share and kana_somewhere and _fits_japanese(text)):
                counts["ja"] += _japanese_words(text)
            else:
                words = chinese_words(text)
                kana = sum(map(_has_kana, words))
                counts["ja"] += kana
                counts["zh"] += len(words) - kana


def _kana_share(sentence: list[Word]) -> float:
    characters = "".join(word.text for word in sentence if word.script == "cjk")
    return sum("\u3040" <= character <= "\u30ff" for character in characters) / max(1, len(characters))


def _has_kana(text: str) -> bool:
    return any("\u3040" <= character <= "\u30ff" for character in text)


def _fits_japanese(text: str) -> bool:
    """Whether Japanese has all these characters: simplified Chinese has many that it does not."""
    try:
        text.encode("euc_jp")
    except UnicodeEncodeError:
        return False
    return True


def chinese_words(text: str) -> list[str]:
    """Chinese segmented by jieba."""
    return [word for chunk in _short_chunks(text) for word in _chinese_segmenter().lcut(chunk)]


def _japanese_words(text: str) -> int:
    """How many words Sudachi finds, in its shortest units."""
    return sum(len(_japanese_segmenter().tokenize(chunk)) for chunk in _short_chunks(text))


def _short_chunks(text: str) -> Iterator[str]:
    return (text[start : start + _LONGEST_CHUNK] for start in range(0, len(text), _LONGEST_CHUNK))


@cache
def _chinese_segmenter():
    """jieba with its dictionary read from its package: its cache lies in the shared temporary folder, where anybody may write."""
    import jieba  # here: only Chinese text needs it, and its dictionary takes a second and 80 MB

    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


@cache
def _japanese_segmenter():
    from sudachipy import Dictionary, SplitMode  # here: only Japanese text needs it

    return Dictionary(dict="small").tokenizer(SplitMode.A)
