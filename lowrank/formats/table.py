"""Cells as lines of text, each column as wide as its widest cell."""

from __future__ import annotations

from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """The first of ``lines`` is the header, over a rule; the first ``left`` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for line in lines:
        padded = enumerate(zip(line, widths, strict=True))
        rows.append("  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in padded))
    return [rows[0], "  ".join("-" * w for w in widths), *rows[1:]]
