"""The documents name what is there: links, paths, commands, and the floors of the code."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from megatron_r1.cli import main
from megatron_r1.config.keys import known_keys
from megatron_r1.config.schema import Config
from tests.paths import ROOT
from tests.unit.test_floors import FLOORS

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md", "benchmarks/README.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("README.md"),
    ]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FOLDERS = ("megatron_r1", "tests", "examples", "slurm", "benchmarks", "docs", "tools", ".github")
PACKAGES = ("megatron.core", "megatron.training")  # of Megatron-LM, no settings of the section of that name
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".sh", ".sbatch", ".hpp", ".toml", ".png")
MADE_BY_RUNS = re.compile(r"^(runs|slurm/logs)/")
OUTSIDE = re.compile(r"\bDESIGN\.md|\bFACTS\.md|shared/|(?<![\w.])\.\./\.\./\.\./")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of `text`, which stands on `page`, that lead nowhere."""
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or ROOT not in target.parents or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@cache
def file_names() -> set[str]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {path.name for path in [*files, *ROOT.iterdir()]}


def missing_paths(page: Path, text: str) -> list[str]:
    """Paths in backticks that look like files or folders of this repository and are not there.

    Bare names of modules and scripts count, too, but in a how-to, whose reader writes files.
    """
    missing, is_how_to = [], page.parent.name == "how_to"
    for code in CODE.findall(text):
        if not re.fullmatch(r"[\w./-]+", code) or MADE_BY_RUNS.match(code):
            continue
        if "/" in code and (code.split("/")[0] in FOLDERS or code.endswith(SUFFIXES)):
            if not (ROOT / code).exists() and not (page.parent / code).exists():
                missing.append(code)
        elif code.endswith((".py", ".hpp", ".sh", ".sbatch")) and code not in file_names() and not is_how_to:
            missing.append(code)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_paths_resolve(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []
    assert missing_paths(page, prose(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_names_nothing_outside_the_repository(page):
    assert OUTSIDE.findall(page.read_text(encoding="utf-8")) == []


def test_what_is_not_there_would_be_found():
    page = ROOT / "docs/README.md"
    text = "[a](nowhere.md) [b](../README.md) [c](../README.md#no-such-heading) `tests/unit/nowhere.py` `nowhere.sbatch` `setup.py`"
    assert broken_links(page, text) == ["nowhere.md", "../README.md#no-such-heading"]
    assert missing_paths(page, text) == ["tests/unit/nowhere.py", "nowhere.sbatch"]


def test_the_code_cites_no_document_outside_the_repository():
    for folder in ("megatron_r1", "tools", "benchmarks", "examples", "slurm"):
        for path in (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".sh", ".sbatch")):
            assert re.findall(r"\bDESIGN\b|\bFACTS\b", path.read_text(encoding="utf-8")) == [], path


def test_every_page_is_reached_from_the_readme():
    start = ROOT / "README.md"
    found, todo = {start}, [start]
    while todo:
        page = todo.pop()
        links = {(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))}
        new = {path for path in links if path.suffix == ".md" and path.is_file()} - found
        found |= new
        todo += new
    assert [named(page) for page in PAGES if page not in found] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_the_floors_in_the_text_are_those_of_the_test():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, flags=re.MULTILINE)
    written = {int(floor): set(re.findall(r"`(\w+)`", names)) for floor, names in rows}
    assert written == dict(enumerate(FLOORS))


def test_every_make_target_in_the_text_is_there():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    sources = [*PAGES, *(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    for path in sources:
        named_targets = re.findall(r"(?:`|^    |run: )make ([a-z][\w-]*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(named_targets) <= targets, path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)  # which names what was, too
def test_settings_in_the_text_are_there(page):
    sections = "|".join(Config.model_fields)
    written = re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_0-9.]*[a-z0-9_])(?![\w(])", page.read_text(encoding="utf-8"))
    keys = set(known_keys())
    groups = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    written = [key for key in written if not key.startswith(PACKAGES)]
    assert [key for key in written if key not in keys | groups and not key.endswith((*SUFFIXES, ".json"))] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_imports_in_the_text_resolve(page):
    text = page.read_text(encoding="utf-8")
    for module, names in re.findall(r"^ *from (megatron_r1[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        if f"\n# {module.replace('.', '/')}.py\n" in text:
            continue  # a module that the page has its reader write; a test of that page runs it
        for name in names.split(","):
            submodule = (ROOT / module.replace(".", "/") / f"{name.strip()}.py").is_file()
            assert submodule or hasattr(importlib.import_module(module), name.strip()), f"{module} has no {name}"


def test_commands_in_the_text_are_there(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^ +([a-z][\w-]*)(?: |$)", capsys.readouterr().out, flags=re.MULTILINE))
    for page in PAGES:
        written = set(re.findall(r"(?:^    |`)megatron-r1 ([a-z][\w-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert written <= commands, page
