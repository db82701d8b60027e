r"""math-verify, guarded: it decides only if the reader of this package (`parse.py`) does not understand the reference.

Left to itself, math-verify 0.9.0 compares with a tolerance and evaluates whatever it gets: it accepts 1/2004! for 1/2006!,
{1,2} for (1,2), 4 for 4\sqrt2 and sequences that differ behind the ellipsis, and 9**9**9**9 fills the memory. So relations,
ellipses and collections never get here, nothing that grows fast is parsed, and numbers are compared to 200 digits.

Its time-outs, which are signals of the main thread, are switched off. The scoring pool ends a process that is late.
"""

from __future__ import annotations

import logging
import re

_MAX_CHARACTERS = 100  #: the time of its parser grows faster than the text
_MAX_DEPTH = 3
_DIGITS = 200
#: factorials, long numerals, powers of powers, exponents of three digits, endless sums, ellipses, several answers and relations;
#: also words, which math-verify drops
_REFUSED = re.compile(
    r"!|[0-9]{20}|[0-9][eE][+-]?[0-9]{3}|\^[^+*/()=-]{0,20}\^|\*\*[^+/()=-]{0,20}\*\*|(?:\^|\*\*)\s*\{?[+-]?[0-9]{3}"
    r"|\\infty|\\[lcdv]?dots|\.\.\.|\u2026"
    r"|[,;=<>]|\\(?:sum|prod|int|lim|le|ge|leq|geq|ne|neq|equiv|approx|sim|in|or|and|boxed)(?![A-Za-z])"
    r"|\\(?:text|math|mbox)|(?<![\\A-Za-z])(?<!\\begin\{)(?<!\\end\{)[A-Za-z]{4}"
)


def math_verify_agrees(answer: str, reference: str) -> bool:
    """Whether math-verify finds two expressions or matrices equal. Not symmetric: the reference is trusted more."""
    if any(len(text) > _MAX_CHARACTERS or _REFUSED.search(text) or not _is_shallow(text) for text in (answer, reference)):
        return False
    from math_verify import LatexExtractionConfig, parse, verify  # here: it imports sympy and is rarely needed
    from sympy import Expr, MatrixBase

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its time-outs are off
    parsed = [
        parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
        for text in (reference, answer)
    ]
    if not all(len(found) == 1 and isinstance(found[0], Expr | MatrixBase) for found in parsed):
        return False
    gold, target = (found[0] for found in parsed)
    if isinstance(gold, MatrixBase) != isinstance(target, MatrixBase) or gold.free_symbols != target.free_symbols:
        return False
    return verify(gold, target, float_rounding=_DIGITS, numeric_precision=_DIGITS, timeout_seconds=None)


def _is_shallow(text: str) -> bool:
    """Whether the brackets close, and no deeper than `_MAX_DEPTH`."""
    depth = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if not 0 <= depth <= _MAX_DEPTH:
            return False
    return depth == 0
