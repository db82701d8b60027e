"""The programs of tests/attacks."""

from __future__ import annotations

import re

from tests.paths import ROOT


def read_programs(name: str) -> dict[str, tuple[set[str], str]]:
    """Name -> (verdicts that are right, source), from a file of tests/attacks."""
    text = (ROOT / "tests/attacks" / name).read_text(encoding="utf-8")
    sections = re.findall(r"^(?:#|//) === ([^:\n]+):? ?(.*)\n((?:(?!(?:#|//) === ).*\n)*)", text, re.MULTILINE)
    return {name: (set(verdicts.split()), source) for name, verdicts, source in sections}
