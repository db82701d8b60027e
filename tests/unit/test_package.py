"""What an installation holds: every file that the package needs, and what the metadata promises."""

from __future__ import annotations

import re
import tomllib

import megatron_r1
from tests.paths import ROOT

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_files_that_are_not_python_are_package_data():
    listed = {
        path
        for package, patterns in METADATA["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = (path for path in (ROOT / "megatron_r1").rglob("*") if path.is_file() and path.suffix != ".py")
    there = {path for path in files if "__pycache__" not in path.parts}
    assert there == listed != set()


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "megatron_r1").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_licence_files_and_the_version_are_there():
    for name in METADATA["project"]["license-files"]:
        assert (ROOT / name).is_file(), name
    for path in re.findall(r"\b(?:megatron_r1|tests|docs)/[\w/.]*\w", (ROOT / "NOTICE").read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"NOTICE names {path}"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", megatron_r1.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {megatron_r1.__version__}\n" in citation


def test_the_constraints_pin_every_dependency():
    project = METADATA["project"]
    optional = project["optional-dependencies"]
    needed = project["dependencies"] + optional["cpu"] + optional["mpi"] + optional["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {_normal(name): version for name, version in (line.split("==") for line in lines if not line.startswith("#"))}
    for requirement in needed:
        name, _, version = requirement.partition("==")
        name = _normal(re.split(r"[>=<\[]", name)[0])
        assert name in pins, f"{requirement} is not pinned in constraints.txt"
        assert not version or pins[name] == version, requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
