"""tests/unit has the folders of megatron_r1, and a test file is named after the module that it tests."""

from __future__ import annotations

import pytest

from tests.paths import ROOT

UNIT, PACKAGE = ROOT / "tests/unit", ROOT / "megatron_r1"
FILES = sorted(UNIT.rglob("test_*.py"))
BESIDE = {"benchmarks", "docs", "examples"}  # folders of the repository beside the package
#: Files that test what no single module has.
SUBJECTS = {
    "config/test_descriptions.py",  # of every setting
    "pipeline/recipe/test_presets.py",  # the examples against the recipe's figures
    "report/test_browser.py",  # the written page, opened in a browser
    "rewards/sandbox/test_attack_table.py",  # tests/attacks/table.txt against the whole sandbox
    "rewards/sandbox/test_attacks.py",  # tests/attacks against the whole sandbox
    "rewards/test_linear.py",  # every expression of the rewards
    "rewards/test_fuzz.py",  # any text against every scorer
    "test_floors.py",  # the structure of the code
    "test_mirror.py",  # and of its tests
    "test_package.py",
    "test_patience.py",  # a helper of tests
}


def is_named_after_a_module(relative: str) -> bool:
    """`test_run.py` and `test_run_stop.py` both test run.py."""
    folder, _, name = relative.rpartition("/")
    words = name.removesuffix(".py").split("_")[1:]
    names = (PACKAGE / folder / "_".join(words[:end]) for end in range(1, len(words) + 1))
    return any(name.is_dir() or name.with_suffix(".py").is_file() for name in names)


@pytest.mark.parametrize("relative", [str(path.relative_to(UNIT)) for path in FILES])
def test_a_test_is_found_where_its_module_is(relative: str) -> None:
    top = relative.partition("/")[0]
    assert top in BESIDE or relative in SUBJECTS or is_named_after_a_module(relative)


def test_subjects_are_there_and_no_folder_is_left_over() -> None:
    assert not [relative for relative in SUBJECTS if not (UNIT / relative).is_file() or is_named_after_a_module(relative)]
    folders = {path.parent.relative_to(UNIT) for path in FILES}
    assert not [folder for folder in folders if str(folder) not in BESIDE and not (PACKAGE / folder).is_dir()]
    assert not [
        path for path in UNIT.rglob("*") if path.is_dir() and path.name != "__pycache__" and not any(path.rglob("test_*.py"))
    ]
