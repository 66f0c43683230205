"""Projections by the names that a user gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowrank.models.fused import matching
from lowrank.models.projections import Projection


def named_by(projections: Iterable[Projection]) -> Callable[[str], set[Projection]]:
    """Those of ``projections`` that a name means: by their own, or by a suffix of their module or tensor."""
    own: dict[str, set[Projection]] = {}
    paths: dict[str, set[Projection]] = {}
    for p in projections:
        own.setdefault(p.name, set()).add(p)
        for path in (p.module, f"{p.module}.{p.param}"):
            paths.setdefault(path, set()).add(p)
    named = matching(paths)
    return lambda name: own.get(name, set()).union(*(paths[path] for path in named(name)))
