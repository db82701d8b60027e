r"""math-verify as a second opinion, under vetoes: if the reader of this package cannot read a side, or says no without proof.

Left to itself, math-verify 0.9.0 compares with a tolerance, drops words and units, and evaluates whatever it gets. Each veto below
names what it would get wrong. What passes them are scalars and matrices, which it compares to 200 digits.

It runs in the main thread only, where a signal stops it after `_CPU_SECONDS` of CPU time; its own time-outs count wall time and are
switched off.
"""

from __future__ import annotations

import logging
import re
import threading

from megatron_r1.cpu_limit import cpu_limit

_MAX_CHARACTERS = 100  #: the time of its parser grows faster than the text
_MAX_DEPTH = 3
_DIGITS = 200
_CPU_SECONDS = 0.3

#: (what is vetoed, why). All are tried on both sides
_VETOES = (
    (r"!", "1/2004! and 1/2006! are equal within its tolerance, and large factorials fill the memory"),
    (r"[0-9]{20}|[0-9][eE][+-]?[0-9]{3}|(?:\^|\*\*)\s*\{?[+-]?[0-9]{3}", "9^{999} and its like cost too much to evaluate"),
    (r"\^[^+*/()=-]{0,20}\^|\*\*[^+/()=-]{0,20}\*\*", "powers of powers: 9**9**9**9 fills the memory"),
    (r"\\infty|\\(?:int|lim)(?![A-Za-z])", "endless sums, integrals and limits are no computed answer, and may take for ever"),
    (r"\\sum|\\prod", "the reader adds up short ones itself, and long ones take for ever"),
    (r"\\[lcdv]?dots|\.\.\.|\u2026", "it drops what stands behind an ellipsis"),
    (r"[,;]|\\(?:in|or|and|boxed)(?![A-Za-z])", "it accepts {1,2} for (1,2), and parts of a list"),
    (r"[=<>:]|\\(?:le|ge|leq|geq|ne|neq|equiv|approx|sim|mod)(?![A-Za-z])", "it drops names and sides of relations, and of ratios"),
    (r"\\(?:text|math|mbox)|(?<![\\A-Za-z])(?<!\\begin\{)(?<!\\end\{)[A-Za-z]{3}", "it drops words, and units with them"),
    (r"(?<![\\A-Za-z])(?:[kcm]m|[km]g|m[lL]|ft|in|yd|mi|oz|lb|hr|[ap]m)(?![A-Za-z])", "it drops units"),
    (r"[%$\u4e00-\u9fff]|\^\s*\{?\s*\\circ", "it drops the percent sign, currencies and degrees"),
    (r"[0-9]\s*_|_\s*\{?[^{}]*[-+*/^]", "it drops the base of a numeral, and reads a_{n+1} as a_n + 1"),
    (r"(?:exp|sinh|cosh|tanh).{0,40}(?:exp|sinh|cosh|\^|[0-9]{3})", "towers of exponentials cost too much"),
    (r"['\"`]|\\cancel|\\not", "it drops primes and strokes"),
    (r"[-+]\s*[-+]|\*\s*\*\s*\*|//", "it mends slips such as --8"),
    (r"[0-9]\s+[0-9]|[0-9]-[0-9]+$", "it multiplies two numbers in a row, and computes ranges and scores"),
)
_VETO = re.compile("|".join(pattern for pattern, _ in _VETOES))


class _OutOfTime(BaseException):
    """Not an Exception: SymPy catches those."""


def math_verify_agrees(answer: str, reference: str) -> bool:
    """Whether math-verify finds two expressions or matrices equal. Not symmetric: the reference is trusted more."""
    if any(len(text) > _MAX_CHARACTERS or not _is_shallow(text) for text in (answer, reference)):
        return False
    if any(_VETO.search(text) for text in (answer, reference)):
        return False
    if threading.current_thread() is not threading.main_thread():
        return False
    import math_verify  # noqa: F401  here, as it imports sympy and is rarely needed; outside of the time that is measured

    try:
        with cpu_limit(_CPU_SECONDS, _OutOfTime()):
            return _agrees(answer, reference)
    except (_OutOfTime, RecursionError, MemoryError):
        return False


def _agrees(answer: str, reference: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, MatrixBase, MatrixExpr

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its time-outs are off
    parsed = []
    for text in (reference, answer):
        found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
        if len(found) != 1:
            return False
        value = found[0]
        parsed.append(value.doit() if isinstance(value, MatrixExpr) else value)
    gold, target = parsed
    if not all(isinstance(value, Expr | MatrixBase) for value in parsed) or isinstance(gold, MatrixExpr | MatrixBase) != isinstance(
        target, MatrixExpr | MatrixBase
    ):
        return False
    if gold.free_symbols != target.free_symbols:
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
