"""A user's function by its import path: what is found, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.import_path import import_function, is_import_path

MODULE = """
NUMBER = 3

def good(batch, settings):
    return batch + settings

def short(batch):
    return batch

def more(batch, settings, *, coefficient=1.0):
    return batch
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_functions.py").write_text(MODULE)
    (tmp_path / "their_broken_module.py").write_text("raise RuntimeError('no\\nlicence')\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_is_found_and_may_have_arguments_with_defaults(module) -> None:
    assert import_function("their_functions:good", "a.key", ("batch", "settings"))(1, 2) == 3
    assert import_function("their_functions:more", "a.key", ("batch", "settings"))(1, 2) == 1
    assert is_import_path("a.b:c") and not is_import_path("grpo")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("their_functions:", "is no import path"),
        ("../their:good", "is no import path"),
        ("nothing_here:good", "nothing_here cannot be imported .*PYTHONPATH"),
        ("their_broken_module:good", r"cannot be imported \(no licence\)"),
        ("their_functions:bad", "holds no function bad"),
        ("their_functions:NUMBER", "holds no function NUMBER"),
        ("their_functions:short", r"is called as short\(batch, settings\), .*too many positional arguments"),
    ],
)
def test_what_cannot_be_used_is_named_on_one_line(module, path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        import_function(path, "a.key", ("batch", "settings"))
    assert "a.key" in str(caught.value) and "\n" not in str(caught.value)
