"""No expression of the rewards takes more than linear time: each is tried as its module uses it, on texts made to make it slow."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_r1.rewards.code.cpp_source import cpp_source
from megatron_r1.rewards.code.extract import Code, Wanted, find_code
from megatron_r1.rewards.code.forms import read_tests
from megatron_r1.rewards.judge.prompts import read_comparison, read_grade, render_payload
from megatron_r1.rewards.language.scorer import LanguageScorer
from megatron_r1.rewards.rules.choice import ChoiceScorer
from tests.paths import ROOT
from tests.timed import cpu_seconds

REWARDS = ROOT / "megatron_r1/rewards"
CHARACTERS = 16_000
SLOWEST_SECONDS = 0.15  #: CPU; a linear one takes some milliseconds, a quadratic one a third of a second at least
LONG, SLOWEST_OF_LONG = 64_000, 3.0  #: a whole scorer, of which a segmenter of words takes most
USED = ("search", "finditer", "findall", "sub", "split", "match", "fullmatch")
INSIDE_THE_SANDBOX = {"runner.py", "remote.py", "program_start.py"}
_PLAIN = r"""
a A z * _ ' " ` ~ $ \ \[ { } [ ] [[ ( ) < > 1 1. 0 - / // /* */ :: f( = a' a- aB A1 a_ \u0061 &#97; %41 \x http:// x@ {"analysis"
'correctness': | answer: 0e + \{ $a
"""
# fmt: off
UNITS = [
    *_PLAIN.split(),
    " ", "\t", "\n", "\r\n", "#include <a>\n", "# include", "class ", "f ", "a ", "\\aa ", "[[ ", "//\\\n", ", ",
    "answer: ", "answer:\n", "```a\n", "~~~\n", "a\n\n",
    *"\u00e9\u0301\u042f\u3042\u6f22\ud55c\u03b1\u200b\u3000\U0001f1e6", "e\u0301",
]
# fmt: on
AROUND = [("x", "x"), ("answer: ", "!"), ('[[{"', "\n")]


def modules() -> Iterator[ModuleType]:
    for path in sorted(REWARDS.rglob("*.py")):
        relative = path.relative_to(REWARDS)
        if relative.parts[0] not in ("math", "workers") and path.name not in INSIDE_THE_SANDBOX and path.name != "__init__.py":
            yield importlib.import_module("megatron_r1.rewards." + ".".join(relative.with_suffix("").parts))


def expressions() -> dict[str, tuple[re.Pattern, str]]:
    """ "module.NAME method" -> (expression, method), for each way in which the module uses it."""
    found = {}
    for module in modules():
        source = Path(module.__file__ or "").read_text(encoding="utf-8")
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                methods = set(re.findall(rf"\b{name}\.(\w+)\b", source)) & set(USED)
                if f"{name} = re.compile" in source:
                    assert methods or f"{name}.pattern" in source or "in (" in source, f"{module.__name__}.{name} is not used"
                found |= {f"{module.__name__}.{name} {method}": (value, method) for method in methods or {"search"}}
    return found


EXPRESSIONS = expressions()


def seconds_of(action: Callable[[], object]) -> float:
    """CPU time; measured again if it seems long, since a busy machine's caches are cold."""
    best = float("inf")
    for _ in range(3):
        best = min(best, cpu_seconds(action)[0])
        if best < SLOWEST_SECONDS:
            break
    return best


def use(expression: re.Pattern, method: str, text: str) -> None:
    subject = text.encode("utf-8", "replace") if isinstance(expression.pattern, bytes) else text
    if method == "sub":
        expression.sub(lambda _: subject[:0], subject)
    elif method == "finditer":
        for _ in expression.finditer(subject):
            pass
    else:
        getattr(expression, method)(subject)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_is_linear(name):
    expression, method = EXPRESSIONS[name]
    for unit in UNITS:
        for before, after in AROUND:
            text = before + unit * (CHARACTERS // len(unit)) + after
            assert seconds_of(lambda text=text: use(expression, method, text)) < SLOWEST_SECONDS, (unit, before, after)


def test_a_quadratic_expression_would_be_found():
    text = "x" + " " * CHARACTERS + "x"
    assert cpu_seconds(use, re.compile(r"\s*```$"), "search", text)[0] > SLOWEST_SECONDS


def test_expressions_that_stand_in_functions_are_known():
    """Those of this list are tried through their functions below."""
    known = {"choice.py": 1, "extract.py": 2, "cpp_source.py": 1, "text.py": 1, "bubblewrap.py": 1}
    found: dict[str, int] = {}
    for module in modules():
        path = Path(module.__file__ or "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in USED and ast.unparse(called.value) == "re":
                found[path.name] = found.get(path.name, 0) + 1
    assert found == known


def _is_read(read: Callable[[str], object], text: str) -> None:
    try:
        read(text)
    except ValueError:
        pass


SUITE = read_tests({"fn_name": "f", "inputs": [[1]], "outputs": [1]})
LANGUAGE = LanguageScorer()
SCORERS: dict[str, Callable[[str], object]] = {
    "choice": lambda text: ChoiceScorer().score(text, "A"),
    "code of a function": lambda text: find_code(text, "python", Wanted("f")),
    "code that reads": lambda text: find_code(text, "cpp", Wanted(reads_input=True)),
    "a Python function": lambda text: Wanted("f").fits(Code(text, "python")),
    "a C++ function": lambda text: Wanted("f").fits(Code(text, "cpp")),
    "a C++ source": lambda text: cpp_source(text, SUITE),
    "a judge's grade": lambda text: _is_read(read_grade, text),
    "a judge's comparison": lambda text: _is_read(read_comparison, text),
    "a payload": lambda text: render_payload(text, "n"),
    "language": lambda text: LANGUAGE.score(f"<think>{text}</think>", "fr"),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_is_linear(name):
    LANGUAGE.score("<think>mot und \u6f22\u5b57 \u304b\u306a</think>", "fr")  # loads its lists of words
    for index, unit in enumerate(UNITS[:: 3 if name == "language" else 1]):
        before, after = AROUND[index % len(AROUND)]
        text = before + unit * (LONG // len(unit)) + after
        assert cpu_seconds(SCORERS[name], text)[0] < SLOWEST_OF_LONG, unit
