"""The names that a Python program finds imported when it is run as a whole, as LiveCodeBench has them."""

from __future__ import annotations

import builtins
import importlib
from functools import cache
from pathlib import Path

_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
_STAR_IMPORTS = (*_MODULES, "typing")


@cache
def imported_names() -> dict[str, str]:
    """Name -> the module that gives it. A module wins over what another one calls so (datetime), Python's own over both (pow)."""
    names: dict[str, str] = {}
    for module_name in _STAR_IMPORTS:
        module = importlib.import_module(module_name)
        public = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
        names |= dict.fromkeys(public, module_name)
    names |= {name: name for name in _MODULES}
    return {name: module for name, module in sorted(names.items()) if not hasattr(builtins, name)}


def program_start(recursion_depth: int) -> str:
    """Source of what runs a Python program, see program_start.py."""
    text = Path(__file__).with_name("program_start.py").read_text(encoding="utf-8")
    return f"R1_NAMES, R1_RECURSION_DEPTH = {imported_names()!r}, {recursion_depth}\n{text}"
