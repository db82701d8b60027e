"""Markdown tables that are aligned for a terminal, too."""

from __future__ import annotations

from collections.abc import Sequence


def align_table(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Rows of cells as a Markdown table whose columns are aligned; the first row is the head.

    Args:
        numbers: all columns but the first hold numbers, which stand at the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    head, *body = (_table_line(row, widths, numbers) for row in rows)
    rule = "|".join("-" * (width + 1) + (":" if numbers and column else "-") for column, width in enumerate(widths))
    return "\n".join([head, f"|{rule}|", *body])


def _table_line(cells: Sequence[str], widths: Sequence[int], numbers: bool) -> str:
    padded = [
        cell.rjust(width) if numbers and column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"
