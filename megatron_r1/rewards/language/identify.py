"""Which language each word of a Latin-script text is in: a hidden Markov model over word frequencies.

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

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl")  #: those that can be targets, and their closest relatives
UNKNOWN = "unknown"  #: a word in a sentence of which too little is known

# Tuned on one half of a collection of sentences, and on spans of one language put into another, so that most names stay with their
# sentence and most foreign phrases of three words do not.
_FLOOR = math.log(1e-7)  #: of a word that a language's list does not hold; the rarest word of a list has 1e-6
_SWITCH = math.log(0.003)
_SWITCH_AT_SENTENCE = math.log(0.1)
_CAPITAL_WEIGHT = 0.3  #: of the evidence of a capital within a sentence: it is more often a name
_ENTRY = (0.0, 0.0, 0.0, 0.0, -2.0, -2.0, -2.0)  #: relatives are entered less easily than targets
_MIN_KNOWN_SHARE = 0.5  #: of a sentence's words; below it the unknown ones are no words

Scores = tuple[float, ...]  #: log-probability of one word in each of `LANGUAGES`


@cache
def word_scores() -> dict[str, Scores]:
    """Log-probabilities of every word of the lists. About half a second and 40 MB, once a process."""
    lists = [wordfreq.get_frequency_dict(language, "small") for language in LANGUAGES]
    scores: dict[str, Scores] = {}
    for word in set().union(*lists):
        scores[word] = tuple(math.log(words[word]) if word in words else _FLOOR for words in lists)
    return scores


def label_words(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """The language of each word of each sentence: one of `LANGUAGES`, or `UNKNOWN`. Linear in the number of words."""
    known = word_scores()
    count = len(LANGUAGES)
    scores = [0.0] * count
    steps: list[list[int] | None] = []  # for each word, the language before each language; None: the same one
    found: list[list[Scores | None]] = []
    for sentence in sentences:
        found.append([_scores_of(word, known) for word in sentence])
        weights = [_CAPITAL_WEIGHT if index and word[0].isupper() else 1.0 for index, word in enumerate(sentence)]
        switch = _SWITCH_AT_SENTENCE
        for emission, weight in zip(found[-1], weights, strict=True):
            best = max(range(count), key=scores.__getitem__)
            origin = None
            for language, entry in enumerate(_ENTRY):
                limit = scores[best] + switch + entry
                if scores[language] < limit:
                    if origin is None:
                        origin = list(range(count))
                    origin[language], scores[language] = best, limit
            if emission is not None:
                scores = [score + weight * log_p for score, log_p in zip(scores, emission, strict=True)]
            steps.append(origin)
            switch = _SWITCH
    return _trace_back(scores, steps, found)


def _trace_back(scores: list[float], steps: list[list[int] | None], found: list[list[Scores | None]]) -> list[list[str]]:
    language = max(range(len(LANGUAGES)), key=scores.__getitem__)
    labels: list[list[str]] = []
    at = len(steps)
    for emissions in reversed(found):
        known_share = sum(emission is not None for emission in emissions) / max(1, len(emissions))
        sentence = []
        for emission in reversed(emissions):
            at -= 1
            sentence.append(LANGUAGES[language] if emission is not None or known_share >= _MIN_KNOWN_SHARE else UNKNOWN)
            origin = steps[at]
            language = language if origin is None else origin[language]
        labels.append(sentence[::-1])
    return labels[::-1]


def _scores_of(word: str, known: dict[str, Scores]) -> Scores | None:
    """The scores of a word, or of its parts if an apostrophe joins two, as in "l'observateur"."""
    word = word.casefold().replace("\u2019", "'") if "ß" not in word else word.lower().replace("\u2019", "'")
    if word in known or "'" not in word:
        return known.get(word)
    parts = [known[part] for part in word.split("'") if part in known]
    return tuple(map(sum, zip(*parts, strict=True))) if parts else None
