"""YAML that is a trap: one line and at once; and YAML that only looks like one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.config.yaml_text import read_yaml
from megatron_r1.errors import ConfigError


def laughs(levels: int, each: int, start: str = "[x]") -> str:
    """Every name stands for several of the one before."""
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * each)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int, each: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * each)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


TRAPS = {
    "billion laughs": laughs(10, 10),
    "a trillion": laughs(40, 2),
    "of mappings": laughs(12, 9, "{x: 1}"),
    "by merging": merges(30, 3),
    "long names": "a: &a " + "x" * 1000 + "\nb: &b [" + "*a, " * 1000 + "]\nc: [" + "*b, " * 1100 + "]",
    "itself": "a: &a [*a]",
    "itself in a mapping": "a: &a {b: {c: *a}}",
    "merges itself": "a: &a {<<: *a}",
    "itself as a key": "&a {*a : 1}",
    "deep lists": "[" * 5000,
    "deep lists that end": "a: " + "[" * 3000 + "]" * 3000,
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(900)) + " " * 900 + "b: 1",
    "deep by aliases": "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 500))]),
    "a day that is none": "a: 2024-13-45",
    "an hour that is none": "a: 2024-01-01 99:99:99",
    "an integer that is too long": "a: " + "9" * 5000,
    "a list as a key": "? [1, 2]\n: 3",
    "a mapping as a key": "? {a: 1}\n: 3",
    "binary that is none": "a: !!binary x",
    "a Python object": "a: !!python/object/apply:os.system [x]",
    "an unknown tag": "a: !mine 1",
    "a set of lists": "a: !!set {[1]: null}",
    "pairs that are none": "a: !!pairs [1]",
    "a number that is none": "a: !!int x",
    "an octal that is none": "a: !!int 0o9",
    "a float that is none": "a: !!float x",
    "a truth that is none": "a: !!bool maybe",
    "nothing as an integer": "a: !!int ''",
    "merging a number": "a:\n  <<: 1",
    "merging a list of numbers": "a:\n  <<: [1]",
    "an alias of nothing": "a: *b",
    "two documents": "a: 1\n---\nb: 2",
    "a control character": "a: \x01",
    "a tab": "a:\n\t- b",
    "a directive": "%YAML 9.9\n---\na: 1",
    "too much": "# " + "x" * (1 << 19),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_one_line_at_once(tmp_path: Path, trap: str):
    (tmp_path / "run.yaml").write_text(TRAPS[trap])
    started = time.process_time()
    with pytest.raises(ConfigError, match="config file .*run.yaml is not valid YAML") as caught:
        load_config(tmp_path / "run.yaml")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600
    assert time.process_time() - started < 5
    if "\n" not in TRAPS[trap]:
        with pytest.raises(ConfigError):
            load_config(None, [f"seed={TRAPS[trap]}"])


def test_endless_and_odd_files_are_one_line(tmp_path: Path, capfd):
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    for path in ("/dev/zero", tmp_path, tmp_path / "nowhere.yaml", tmp_path / "binary.yaml"):
        assert cli.main(["sft", "--config", str(path)]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1


def test_merge_keys_work_and_the_own_key_wins(tmp_path: Path):
    text = """
base: &base {learning_rate: 1e-4, epochs: 3}
other: &other {batch_size: 7, epochs: 9}
one: {<<: *base, epochs: 2}
several: {<<: [*base, *other]}
nested: {<<: {<<: *base, a: 1}, b: 2}
twice: {a: *base, b: *base}
"""
    found = read_yaml(text, "text")
    assert found["one"] == {"learning_rate": 1e-4, "epochs": 2}
    assert found["several"] == {"learning_rate": 1e-4, "epochs": 3, "batch_size": 7}
    assert found["nested"] == {"learning_rate": 1e-4, "epochs": 3, "a": 1, "b": 2}
    late = "x: {y: &a {<<: {k: 1}, k: 2}}\nb: {<<: *a}\nc: {<<: {d: 1}, <<: {d: 2}, =: 3}"
    assert read_yaml(late, "text") == {"x": {"y": {"k": 2}}, "b": {"k": 2}, "c": {"d": 1, "=": 3}}
    (tmp_path / "run.yaml").write_text("sft:\n  <<: &common {epochs: 2}\n  batch_size: 4\n")
    config = load_config(tmp_path / "run.yaml")
    assert config.sft.epochs == 2 and config.sft.batch_size == 4
    with pytest.raises(ConfigError, match="key 'epochs' is given twice"):
        read_yaml("a: {<<: {epochs: 1}, epochs: 2, epochs: 3}", "text")


def test_neighbours_are_read_as_before():
    assert read_yaml("", "x") is None and read_yaml("# nothing", "x") is None and read_yaml("1e-4", "x") == 1e-4
    assert read_yaml("[" * 90 + "]" * 90, "x") is not None
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: [*a, *a]", "x") == {"a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]]}
    assert read_yaml("'<<': 1", "x") == {"<<": 1}
    assert read_yaml("a: 2024-01-31", "x")["a"].isoformat() == "2024-01-31"
    assert read_yaml("x" * 100_000, "x") == "x" * 100_000


def test_a_long_value_or_key_does_not_fill_the_screen():
    for override in (f"seed={'x' * 100_000}", f"grpo={'x' * 100_000}", f"{'k' * 100_000}=1", "a\nb=1"):
        with pytest.raises(ConfigError) as caught:
            load_config(None, [override])
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value), str(caught.value)[:300]
