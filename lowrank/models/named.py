"""Projections by the patterns that a user gives: the answer of `Projection.is_called`, for many patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowrank.models.patterns import SHARED, suffixes
from lowrank.models.projections import Projection


def named_by(projections: Iterable[Projection]) -> Callable[[str], list[Projection]]:
    """Those of ``projections`` that a pattern names, in their order; one without wildcards is looked up."""
    projections = list(projections)
    ending: dict[str, dict[Projection, None]] = {}
    for p in projections:
        for path in (p.module, f"{p.module}.{p.param}"):
            for suffix in suffixes(path):
                ending.setdefault(suffix, {})[p] = None
        for suffix in suffixes(p.path) if p.block else ():
            ending.setdefault(f"{suffix}[{p.block}]", {})[p] = None

    def named(pattern: str) -> list[Projection]:
        found = [] if f"[{SHARED}" in pattern else list(ending.get(pattern, ()))
        if not found and any(sign in pattern for sign in "*?["):
            found = [p for p in projections if p.is_called(pattern)]
        return found

    return named
