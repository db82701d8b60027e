"""Markdown tables."""

from __future__ import annotations

from megatron_r1.runtime.markdown_table import align_table


def test_columns_are_aligned_and_numbers_stand_at_the_right():
    rows = [["name", "n"], ["a", "100"], ["long name", "7"]]
    assert align_table(rows).splitlines() == [
        "| name      | n   |",
        "|-----------|-----|",
        "| a         | 100 |",
        "| long name | 7   |",
    ]
    assert align_table(rows, numbers=True).splitlines() == [
        "| name      |   n |",
        "|-----------|----:|",
        "| a         | 100 |",
        "| long name |   7 |",
    ]
