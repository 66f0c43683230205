"""What each projection needs measured, and the memory that it will take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lowrank.models.projections import Projection, Role

SHARING = ({Role.QUERY, Role.KEY, Role.VALUE}, {Role.GATE, Role.UP})  # as a rule these read one input


Needs = Collection[str] | Mapping[Projection, Collection[str]]
"""The statistics to measure: the same for all projections, or for each its own."""


def by_projection(projections: Sequence[Projection], needs: Needs) -> dict[Projection, frozenset[str]]:
    """What each projection needs, of those that need anything."""
    each = needs if isinstance(needs, Mapping) else dict.fromkeys(projections, needs)
    return {p: frozenset(each[p]) for p in projections if each.get(p)}


def predicted_bytes(projections: Sequence[Projection], needs: Needs) -> int:
    """The memory that the statistics will take, where projections share inputs as is usual."""
    wanted = by_projection(projections, needs)
    size = sum(p.in_features * p.out_features for p, each in wanted.items() if "gradient" in each)
    for kind in ("covariance", "moment"):
        readers = [p for p, each in wanted.items() if kind in each]
        stacked = any(p.block for p in readers)
        inputs = {
            (p.module.rpartition(".")[0], _reads(p), p.in_features, p.block.split(".")[0] if stacked else "")
            for p in readers
        }
        size += sum(width * width for _, _, width, _ in inputs)
    return 4 * size


def _reads(p: Projection) -> str:
    """A name for the input of ``p`` among its siblings."""
    return next((str(sorted(roles)) for roles in SHARING if p.role in roles), p.name)
