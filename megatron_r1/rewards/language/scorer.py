"""Language-consistency reward: target-language words over all words of the reasoning (R1 v2 (arXiv) equation 7)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from megatron_r1.rewards.language.identify import UNKNOWN, WordModel, cyrillic_words, latin_words
from megatron_r1.rewards.language.text import LONGEST_WORD, FoundWords, Word, read_words, reasoning_of, sentence_texts
from megatron_r1.rewards.protocol import Verdict

LANGUAGES = ("en", "zh", "ja", "ko", "de", "fr", "es", "ru")
OTHER = "other"  #: a word of a language that is not counted by name

MAX_CHARACTERS = 500_000  #: of reasoning; the recipe's longest response, 65,536 tokens, is about half of it
_JAPANESE_KANA_SHARE = 0.15  #: of a sentence's Chinese characters and kana; Chinese quotes a kana now and then
_LONGEST_HANJA = 2  #: Chinese characters in a row that Korean newspapers write, as in 前
_LONGEST_CHUNK = 64  #: characters for a segmenter at once: jieba's time grows with the square of a run
_RUSSIAN = frozenset("абвгдеёжзийклмнопрстуфхцчшщъыьэюя\u0301")
_LONG_WORD = 13  #: letters of an unknown word from which it may be several without a space
_LETTERS_OF_A_WORD = 6
_LONGEST_HANGUL = 12  #: syllables of a word
_SYLLABLES_OF_A_WORD = 3
_SHORT_SENTENCE = 8  #: Chinese characters, of which so few may fit Japanese by chance
_KATAKANA_ROW = 12  #: characters of a sentence of katakana alone that are no Japanese but another language's sounds
_KOREAN_ROW = 12  #: Korean words from which their endings must look like Korean
#: last syllables of Korean words: particles, endings of verbs
_KOREAN_ENDINGS = frozenset("은는이가을를에의로고다요면서도와과지게며만한할된될하해여어니까자인적들라던든네죠")
_KOREAN_ENDING_SHARE = 0.3
_PHRASE = 4  #: words of a phrase; see `_without_repeats`
_MOST_REPEATS = 3
_MOST_MENTIONS = 2  #: of a loose word


class LanguageScorer:
    """The share of the reasoning's words that are in the target language.

    Code, numbers, formulas, acronyms and names of variables do not count, as long as they are what they look like: a row of words
    counts wherever it stands, and loose words of other languages in what is set aside count once they are too many. A phrase counts
    three times at most. The verdict is "correct" from `threshold`; the score is the share itself.

    Settings:
        min_words: a reasoning of fewer words counts as one of this many, most of them in no language. At least 1: reasoning without
            words has a share of 0, since there is nothing to reward.
        aside_words: loose words of other languages in what is set aside that are free, per word of prose.
        threshold: see above.
    """

    name = "language"

    def __init__(self, min_words: int = 8, aside_words: float = 1.0, threshold: float = 0.9):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected a share above 0")
        if min_words < 1 or aside_words < 0:
            raise ValueError(f"min_words is {min_words} and aside_words is {aside_words}, expected at least 1 and 0")
        self._min_words, self._aside_words, self._threshold = min_words, aside_words, threshold

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`; the reference is a language such as "en" or "zh-CN"."""
        language = reference.lower().replace("_", "-").partition("-")[0] if isinstance(reference, str) else None
        if language not in LANGUAGES:
            return Verdict(None, "unscorable", f"no target language: {reference!r:.40}, expected one of {', '.join(LANGUAGES)}")
        reasoning = reasoning_of(response)
        if len(reasoning) > MAX_CHARACTERS:
            return Verdict(0.0, "wrong", "the reasoning is too long to be one")
        found = read_words(reasoning)
        words = Counter(_without_repeats(_label(found.sentences)))
        hidden = _hidden_words(found, language) - int(self._aside_words * words.total())
        if hidden > 0:
            words[OTHER] += hidden
        share = words[language] / max(words.total(), self._min_words)
        outcome = "correct" if share >= self._threshold else "wrong"
        aside = f", {hidden} of them in what is set aside" if hidden > 0 else ""
        return Verdict(share, outcome, f"{words[language]} of {words.total()} words are {language}{aside}", {"words": dict(words)})


def count_words(text: str) -> Counter[str]:
    """How many words of a text are in each language. What is no word does not count, nor do loose words of what is set aside."""
    return Counter(language for language, _ in _label(read_words(text).sentences))


def _hidden_words(found: FoundWords, language: str) -> int:
    """How many loose words of what is set aside are not in this language; code names a thing often, which counts twice."""
    seen: Counter[tuple[str, str]] = Counter((label, word.lower()) for label, word in _label(found.loose) if label != language)
    return sum(count if len(word) > LONGEST_WORD else min(count, _MOST_MENTIONS) for (_, word), count in seen.items())


def _without_repeats(labelled: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The languages of the words, without those that end a phrase for the fourth time: one sentence, repeated, is no reasoning.

    A phrase is a word and those of the same language before it.
    """
    recent: dict[str, deque[str]] = {}
    seen: Counter[tuple[str, ...]] = Counter()
    for language, word in labelled:
        phrase = recent.setdefault(language, deque(maxlen=_PHRASE))
        phrase.append(word)
        key = (language, *phrase)
        if len(phrase) == _PHRASE and language in LANGUAGES:
            seen[key] += 1
        if seen[key] <= _MOST_REPEATS:
            yield language


def _label(sentences: list[list[Word]]) -> Iterator[tuple[str, str]]:
    """The language of every word, and the word."""
    yield from _label_letters(sentences, "latin", latin_words)
    yield from _label_letters(sentences, "cyrillic", cyrillic_words)
    kana_somewhere = any(_kana_share(sentence) >= _JAPANESE_KANA_SHARE for sentence in sentences)
    kanji = [text for sentence in sentences if (text := _cjk_of(sentence)) and not _has_kana(text)]
    all_fit = kana_somewhere and all(map(_fits_japanese, kanji))
    hangul = [word.text for sentence in sentences for word in sentence if word.script == "hangul"]
    korean = "ko" if _is_korean(hangul) else OTHER
    for sentence in sentences:
        text = _cjk_of(sentence)
        fits = all_fit if len(text) < _SHORT_SENTENCE else kana_somewhere and _fits_japanese(text)
        yield from _label_other_scripts(sentence, fits, korean)


def _label_letters(sentences: list[list[Word]], script: str, load: Any) -> Iterator[tuple[str, str]]:
    texts = list(sentence_texts(sentences, script))
    if not any(texts):
        return
    model: WordModel = load()
    for words, labels in zip(texts, model.label_words(texts), strict=True):
        for word, label in zip(words, labels, strict=True):
            if script == "cyrillic" and (label != "ru" or not _RUSSIAN.issuperset(word.lower())):
                label = UNKNOWN if label == UNKNOWN else OTHER
            if len(word) > LONGEST_WORD:
                label = OTHER
            count = max(1, word.count("'") + word.count("\u2019")) if model.knows(word) else _several(word)
            yield from ((label, word) for _ in range(count))


def _several(word: str) -> int:
    """How many words an unknown one may be."""
    return 1 if len(word) < _LONG_WORD else len(word) // _LETTERS_OF_A_WORD


def _label_other_scripts(sentence: list[Word], fits_japanese: bool, korean: str) -> Iterator[tuple[str, str]]:
    """Args: a sentence without kana is Japanese if `fits_japanese`; what words in hangul are."""
    scripts = Counter(word.script for word in sentence)
    kana_share = _kana_share(sentence) if scripts["cjk"] else 0.0
    sounds = bool(kana_share) and _is_katakana(sentence)
    for script, text in sentence:
        if script == "hangul":
            if len(text) > _LONGEST_HANGUL:
                yield from ((OTHER, text) for _ in range(len(text) // _SYLLABLES_OF_A_WORD))
            else:
                yield korean, text
        elif script == "cjk":
            if scripts["hangul"] > scripts["cjk"] and len(text) <= _LONGEST_HANJA and not _has_kana(text):
                yield "ko", text
            elif kana_share >= _JAPANESE_KANA_SHARE or (fits_japanese and not kana_share):
                yield from ((OTHER if sounds else "ja", word) for word in _japanese_words(text))
            else:
                yield from (("ja" if _has_kana(word) else "zh", word) for word in chinese_words(text))
        elif script not in ("latin", "cyrillic"):
            yield from ((OTHER, text) for _ in range(_several(text)))


def _cjk_of(sentence: list[Word]) -> str:
    return "".join(word.text for word in sentence if word.script == "cjk")


def _kana_share(sentence: list[Word]) -> float:
    characters = _cjk_of(sentence)
    return sum("\u3040" <= character <= "\u30ff" for character in characters) / max(1, len(characters))


def _is_katakana(sentence: list[Word]) -> bool:
    """Whether a sentence is katakana alone: names and loans in Japanese are, but no whole sentence."""
    characters = _cjk_of(sentence)
    return len(characters) >= _KATAKANA_ROW and all("\u30a0" <= character <= "\u30ff" for character in characters)


def _is_korean(words: list[str]) -> bool:
    """Whether words in hangul end as Korean ones do. Few words may be names."""
    endings = sum(word[-1] in _KOREAN_ENDINGS for word in words)
    return len(words) < _KOREAN_ROW or endings >= _KOREAN_ENDING_SHARE * len(words)


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


def _japanese_words(text: str) -> list[str]:
    """The words that Sudachi finds, in its shortest units."""
    return [word.surface() for chunk in _short_chunks(text) for word in _japanese_segmenter().tokenize(chunk)]


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
