"""Families are found by themselves, say what is asked of them, and no other package knows one by its class."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.model import registry
from megatron_r1.model.presets import PRESETS
from megatron_r1.model.registry import families
from tests.paths import ROOT

PACKAGE = ROOT / "megatron_r1"
FAMILY_FILES = sorted(path for path in (PACKAGE / "model/families").glob("*.py") if path.name != "__init__.py")
ANOTHER = """
from typing import ClassVar, Literal
from megatron_r1.model.families.llama import Llama
class Another(Llama):
    model_type: Literal["{model_type}"] = "{model_type}"
FAMILY = Another
"""


@pytest.fixture
def announce(tmp_path, monkeypatch):
    """Announces a module of this text as an installed package would."""

    def announce(text: str) -> None:
        (tmp_path / "another_family.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "another_family", raising=False)
        entry = EntryPoint("another", "another_family", registry.ENTRY_POINTS)
        monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([entry]).select(group=group))
        families.cache_clear()

    yield announce
    sys.modules.pop("another_family", None)
    families.cache_clear()


def test_every_file_is_a_family():
    found = families()
    assert [family.module for family in found.values()] == [f"megatron_r1.model.families.{path.stem}" for path in FAMILY_FILES]
    assert list(found) == [path.stem for path in FAMILY_FILES]
    assert PRESETS.keys() == {name for family in found.values() for name in family.presets}


def test_an_installed_package_brings_a_family(announce):
    announce(ANOTHER.format(model_type="another"))
    assert list(families())[-1] == "another" and families()["another"].architecture.__name__ == "Another"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import no_such_module", "another_family cannot be imported: ModuleNotFoundError"),
        ("FAMILY = 3", "another_family does not define FAMILY"),
        ("from megatron_r1.model.architecture import Architecture as FAMILY", "Architecture.model_type has no default"),
        (ANOTHER.format(model_type="llama"), "model_type or preset"),
        (ANOTHER.format(model_type="another") + 'PRESETS = {"tiny": None}', "families.deepseek_v3 and another_family"),
    ],
)
def test_a_family_that_does_not_do_is_one_line(announce, text, named):
    announce(text)
    with pytest.raises(ConfigError, match=named) as caught:
        families()
    assert "\n" not in str(caught.value)


def names_of_families(tree: ast.Module, classes: set[str]) -> list[str]:
    """Classes of families that a module names, and checks of the class of an architecture."""
    named = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in classes]
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    checks = [call for call in calls if call.func.id == "isinstance" and isinstance(call.args[0], ast.Name)]
    return named + [f"isinstance({call.args[0].id}" for call in checks if call.args[0].id == "arch"]


def family_classes() -> set[str]:
    trees = (ast.parse(path.read_text()) for path in FAMILY_FILES)
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def test_no_other_module_knows_a_family():
    others: list[Path] = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "model/families"]
    found = {str(path): names for path in others if (names := names_of_families(ast.parse(path.read_text()), family_classes()))}
    assert found == {}


def test_a_check_of_the_class_would_be_found():
    tree = ast.parse("def f(arch):\n    if isinstance(arch, Other):\n        return Qwen2(1)")
    assert names_of_families(tree, family_classes()) == ["Qwen2", "isinstance(arch"]
