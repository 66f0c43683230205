"""Which runs the study wants, and in which order: the most informative first. It trains nothing.

A method's learning rate is swept on a grid of half decades, outward from a guess, until the best is inside;
then the best two rates get more seeds. What is wanted next depends on what has been seen: a study can be
stopped and taken up again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log10
from pathlib import Path
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One run. ``match`` is what methods have in common: the "rank", or LoRA's "parameters" at that rank."""

    task: str
    method: str
    rank: int
    match: str
    lr: float
    seed: int

    @property
    def setting(self) -> tuple[str, str, int, str]:
        """All but rate and seed: what a sweep is of."""
        return self.task, self.method, self.rank, self.match


@dataclass(frozen=True)
class Result:
    """What a run showed: ``score`` is higher for better; None where it diverged."""

    cell: Cell
    score: float | None
    details: Mapping[str, Any]

    @property
    def comparable(self) -> float:
        return -1e9 if self.score is None else self.score

    def to_json(self) -> str:
        return json.dumps({**asdict(self.cell), "score": self.score, **self.details})


def read(file: Path) -> list[Result]:
    """The results in ``file``, one JSON line each; a last line that was cut short is left out."""
    results = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        cell = Cell(**{name: row.pop(name) for name in Cell.__dataclass_fields__})
        results.append(Result(cell, row.pop("score"), row))
    return results


def half_decade(exponent: int) -> float:
    """1e-3 for -6, 3e-3 for -5, 1e-2 for -4."""
    return float(f"{10 ** (exponent / 2):.0e}")


def nearest(lr: float) -> int:
    """The place of ``lr`` on the grid."""
    return round(2 * log10(lr))


def wanted(
    results: Iterable[Result],
    settings: Sequence[tuple[str, str, int, str]],
    guesses: Mapping[str, float],
    *,
    seeds: int,
    running: Iterable[Cell] = (),
) -> Iterator[Cell]:
    """Cells still to run, the most informative first.

    Settings count by blocks of one rank, match and task, in the order in which they are given. In a block
    every method's sweep comes first, one step outward at a time; then more seeds at its best two rates, a
    seed for all methods before the next.

    Args:
        settings: task, method, rank and match of each sweep.
        guesses: by method, the rate to begin with.
        seeds: at the best two rates of a sweep.
        running: cells that someone works on: they are not given again.
    """
    found: dict[tuple[str, str, int, str], dict[int, list[Result]]] = {}
    taken = set(running)
    for result in results:
        places = found.setdefault(result.cell.setting, {})
        places.setdefault(nearest(result.cell.lr), []).append(result)
        taken.add(result.cell)
    blocks: dict[tuple[str, int, str], int] = {}
    order: list[tuple[tuple[int, int, int], Cell]] = []
    for setting in settings:
        task, method, rank, match = setting
        block = blocks.setdefault((task, rank, match), len(blocks))
        seen = {place: rows for place, rows in found.get(setting, {}).items() if _first_seed(rows)}
        sweep = list(_sweep(nearest(guesses[method]), seen))
        order += [((block, 0, i), Cell(*setting, half_decade(place), 0)) for i, place in enumerate(sweep)]
        if not sweep:
            best = sorted(seen, key=lambda place: -mean(r.comparable for r in seen[place]))[:2]
            more = [(seed, place) for seed in range(1, seeds) for place in best]
            order += [((block, seed, 0), Cell(*setting, half_decade(place), seed)) for seed, place in more]
    yield from (cell for _, cell in sorted(order, key=lambda pair: pair[0]) if cell not in taken)


def _first_seed(rows: list[Result]) -> Result | None:
    return next((row for row in rows if row.cell.seed == 0), None)


def _sweep(guess: int, seen: Mapping[int, list[Result]]) -> Iterator[int]:
    """Places of the grid to see next: the guess and its neighbours, then one beyond a best at the edge."""
    start = [guess, guess - 1, guess + 1]
    missing = [place for place in start if place not in seen]
    if missing:
        yield from missing
        return
    scores = {place: _first_seed(rows).comparable for place, rows in seen.items()}  # type: ignore[union-attr]
    best = max(scores, key=lambda place: (scores[place], -place))
    low, high = min(scores), max(scores)
    if best == low and high - low < 8:
        yield low - 1
    elif best == high and high - low < 8:
        yield high + 1
