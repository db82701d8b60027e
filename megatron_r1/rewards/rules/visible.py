"""Does a text hold anything that can be seen?"""

from __future__ import annotations

import unicodedata

#: letters and symbols by their category that print as nothing: fillers of hangul and Khmer, blanks of Braille, music and
#: hieroglyphs, the place of an object
_BLANK = frozenset("\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufffc\U0001d159\U00013441\U00013442")
_SEEN = frozenset("LNPS")  #: letters, numbers, punctuation, symbols; marks alone, spaces, format and control characters are none


def has_visible(text: str) -> bool:
    """Whether any character of the text prints as something by itself."""
    return any(unicodedata.category(character)[0] in _SEEN and character not in _BLANK for character in text)
