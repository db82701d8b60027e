"""Which language each word of a text in one script is in: a hidden Markov model over word frequencies.

A single word often belongs to several languages ("die", "son", "international"), so the most likely sequence of languages is found:
to stay in a language is likely, to change it is not, except between sentences. Words that no list holds (names, compounds,
misspellings) carry no evidence and follow their neighbours.

The frequencies are those of the wordfreq package (its small lists, about 30,000 words a language, shipped with it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import wordfreq

UNKNOWN = "unknown"  #: a word in a sentence of which too little is known

# Tuned on one half of a collection of sentences, and on spans of one language put into another, so that most names stay with their
# sentence and most foreign phrases of three words do not.
_FLOOR = math.log(1e-7)  #: of a word that a language's list does not hold; the rarest word of a list has 1e-6
_SWITCH = math.log(0.003)
_SWITCH_AT_SENTENCE = math.log(0.1)
_CAPITAL_WEIGHT = 0.3  #: of the evidence of a capital within a sentence: it is more often a name
_RELATIVE = -2.0  #: relatives are entered less easily than targets
_COMMON = math.log(1e-3)  #: the hundred or so most frequent words of a language
_MIN_KNOWN_SHARE = 0.5  #: of a sentence's words; below it the unknown ones are no words

Scores = tuple[float, ...]  #: log-probability of one word in each language of a model

# wordfreq has Serbian in Latin letters only.
_SERBIAN_PAIRS = {"dž": "џ", "lj": "љ", "nj": "њ"}
_SERBIAN = str.maketrans("abcčćdđefghijklmnoprsštuvzž", "абцчћдђефгхијклмнопрсштувзж")


class WordModel:
    """The languages of one script.

    Args:
        targets: languages that can be asked for.
        relatives: their neighbours, which they must not be taken for.
    """

    def __init__(self, targets: Sequence[str], relatives: Sequence[str]) -> None:
        self.languages = (*targets, *relatives)
        self._entry = (0.0,) * len(targets) + (_RELATIVE,) * len(relatives)
        lists = [_frequencies(language) for language in self.languages]
        self._known: dict[str, Scores] = {}
        for word in set().union(*lists):
            self._known[word] = tuple(math.log(words[word]) if word in words else _FLOOR for words in lists)

    def knows(self, word: str) -> bool:
        """Whether a list holds the word, or one of the parts that an apostrophe joins."""
        return self._scores_of(word) is not None

    def count_common(self, words: Sequence[str]) -> int:
        """How many of these words are among the most frequent of some language: articles, pronouns, prepositions."""
        found = (self._scores_of(word) for word in words)
        return sum(scores is not None and max(scores) >= _COMMON for scores in found)

    def label_words(self, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
        """The language of each word of each sentence: one of `languages`, or `UNKNOWN`. Linear in the number of words."""
        count = len(self.languages)
        scores = [0.0] * count
        steps: list[list[int] | None] = []  # for each word, the language before each language; None: the same one
        found: list[list[Scores | None]] = []
        for sentence in sentences:
            found.append([self._scores_of(word) for word in sentence])
            weights = [_CAPITAL_WEIGHT if index and word[0].isupper() else 1.0 for index, word in enumerate(sentence)]
            switch = _SWITCH_AT_SENTENCE
            for emission, weight in zip(found[-1], weights, strict=True):
                best = max(range(count), key=scores.__getitem__)
                origin = None
                for language, entry in enumerate(self._entry):
                    limit = scores[best] + switch + entry
                    if scores[language] < limit:
                        if origin is None:
                            origin = list(range(count))
                        origin[language], scores[language] = best, limit
                if emission is not None:
                    scores = [score + weight * log_p for score, log_p in zip(scores, emission, strict=True)]
                steps.append(origin)
                switch = _SWITCH
        return self._trace_back(scores, steps, found)

    def _trace_back(self, scores: list[float], steps: list[list[int] | None], found: list[list[Scores | None]]) -> list[list[str]]:
        language = max(range(len(self.languages)), key=scores.__getitem__)
        labels: list[list[str]] = []
        at = len(steps)
        for emissions in reversed(found):
            known_share = sum(emission is not None for emission in emissions) / max(1, len(emissions))
            sentence = []
            for emission in reversed(emissions):
                at -= 1
                is_word = emission is not None or known_share >= _MIN_KNOWN_SHARE
                sentence.append(self.languages[language] if is_word else UNKNOWN)
                origin = steps[at]
                language = language if origin is None else origin[language]
            labels.append(sentence[::-1])
        return labels[::-1]

    def _scores_of(self, word: str) -> Scores | None:
        word = word.casefold().replace("\u2019", "'") if "ß" not in word else word.lower().replace("\u2019", "'")
        if word in self._known or "'" not in word:
            return self._known.get(word)
        parts = [self._known[part] for part in word.split("'") if part in self._known]
        return tuple(map(sum, zip(*parts, strict=True))) if parts else None


@cache
def latin_words() -> WordModel:
    """Languages in Latin letters. Built in a second or so, 60 MB; once a process."""
    return WordModel(("en", "de", "fr", "es"), ("it", "pt", "nl", "ca", "da", "sv", "ro", "pl"))


@cache
def cyrillic_words() -> WordModel:
    """Languages in Cyrillic letters."""
    return WordModel(("ru",), ("uk", "bg", "mk", "sr"))


def _frequencies(language: str) -> dict[str, float]:
    if language != "sr":
        return wordfreq.get_frequency_dict(language, "small")
    words: dict[str, float] = {}
    for word, frequency in wordfreq.get_frequency_dict("sh", "small").items():
        for pair, letter in _SERBIAN_PAIRS.items():
            word = word.replace(pair, letter)
        words.setdefault(word.translate(_SERBIAN), frequency)
    return words
