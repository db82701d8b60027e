"""Text as sentences, for models that need to know where they end (Megatron's layout `sentence`)."""

from __future__ import annotations

import re

# The rules SB6 to SB11 of Unicode's UAX #29 that decide most texts: a sentence ends behind its marks and closing quotes where space
# and no lower-case letter follow, at once behind the marks of Chinese and Japanese, and at every line break.
_CLOSE = "[\"'\u2018\u2019\u201c\u201d\u00bb\u300d\u300f\uff09)\\]]*"
_NEXT = "(?=\\s+[^\\s\\W_a-z]|\\s+[\"'\u201c\u2018\u00ab(\\[]|\\s*$)"
_END = re.compile(f"(?:[.!?\u2026]+{_CLOSE}{_NEXT}|[\u3002\uff01\uff1f\uff61]+{_CLOSE}|\n)", re.MULTILINE)
# Behind these a full stop is part of the word: titles, and single letters, as in "J. S. Bach".
_SHORT = re.compile(r"(?:^|[\s(])(?:[^\W\d_]|Dr|Mr|Mrs|Ms|Mme|Prof|St|Jr|Sr|vs|e\.g|i\.e|cf|No|Fig|Vol)\.$")


def split_sentences(text: str) -> list[str]:
    """The sentences without the space around them, in order; nothing but space is left out."""
    sentences = []
    start = 0
    for found in _END.finditer(text):
        if _SHORT.search(text[max(start, found.end() - 8) : found.end()]):
            continue
        sentences.append(text[start : found.end()].strip())
        start = found.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]
