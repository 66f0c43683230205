"""What tuning has found, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from lowrank.layers import tuning_cache

NOTHING = "Nothing has been tuned yet. With LOWRANK_TUNE=1 the first training steps do it."


@dataclass(frozen=True)
class Row:
    """One case on one device: the seconds of each candidate by its name, and the one that is used."""

    device: str
    case: str
    times: Mapping[str, float]
    choice: str


@dataclass(frozen=True)
class TuningReport:
    """The rows by device and case. ``print`` shows them as a table for each device."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        tables = [_table(device, list(rows)) for device, rows in groupby(self.rows, lambda row: row.device)]
        return "\n\n".join(tables) or NOTHING


def _table(device: str, rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.times))
    lines = [("µs", *names, "choice")]
    for row in rows:
        times = (f"{row.times[name] * 1e6:,.1f}" if name in row.times else "" for name in names)
        lines.append((row.case, *times, row.choice))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    shown = [
        [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(middle, widths[1:], strict=False)), last]
        for first, *middle, last in lines
    ]
    return "\n".join([device, *("  ".join(cells) for cells in shown)])


def tuning_report() -> TuningReport:
    """What tuning has found with these versions of torch and lowrank, in this process and in earlier ones.

    ``print`` shows a table for each device: each case, the microseconds of each candidate, and the choice.
    """
    found = sorted(tuning_cache.everything().items())
    return TuningReport(tuple(Row(device, key, each.times, each.choice) for (device, key), each in found))
