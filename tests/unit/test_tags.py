"""Nobody but `tags.py` spells the tags of R1's answers: a spelling of one's own would drift from what rewards look for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, without_reasoning
from tests.paths import ROOT

TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
SPELLED_IN = ROOT / "megatron_r1/tags.py"
PROSE = {"description", "help"}  #: keyword arguments whose text is for people


def spelled_tags(tree: ast.Module) -> Iterator[int]:
    """Lines of the code that hold a tag as text; docstrings and texts for people are left out."""
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            prose.add(id(node.body[0].value))
        if isinstance(node, ast.keyword) and node.arg in PROSE:
            prose |= {id(part) for part in ast.walk(node.value)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    yield from (node.lineno for node in texts if id(node) not in prose and any(tag in node.value for tag in TAGS))


def test_the_tags_are_those_of_the_paper():
    assert TAGS == ("<think>", "</think>", "<answer>", "</answer>")


@pytest.mark.parametrize("path", sorted((ROOT / "megatron_r1").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_tags_spells_the_tags(path: Path):
    assert path == SPELLED_IN or not list(spelled_tags(ast.parse(path.read_text(encoding="utf-8"))))


def test_a_spelling_would_be_found():
    source = '"""<think>"""\nField(description="</think>")\nx = "a <think>"\ny = f"</answer>{x}"\nz = ("\\n<answer>",)'
    assert list(spelled_tags(ast.parse(source))) == [3, 4, 5]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("<think>\na\n</think>\n\nb ", "b"),
        ("  <think>a</think> b </think> c", "b </think> c"),
        (" b ", "b"),
        ("b <think>a</think>", "b <think>a</think>"),
        ("<think>never closed", ""),
    ],
)
def test_what_follows_the_first_reasoning(answer, said):
    assert without_reasoning(answer) == said
