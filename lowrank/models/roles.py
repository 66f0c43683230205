"""Roles as the user says them, by pattern: for weights that names tell nothing of, or tell wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lowrank.models.families import Role
from lowrank.models.fused import matches

Roles = Mapping[str, str]  # dotted-suffix pattern → role


def told_role(path: str, roles: Roles) -> Role | None:
    """The role that ``roles`` say of the module ``path``; of several patterns the longest counts."""
    pattern = telling(path, roles)
    return None if pattern is None else Role(roles[pattern])


def telling(path: str, roles: Roles) -> str | None:
    """The pattern of ``roles`` that says the role of the module ``path``: of several the longest."""
    patterns = [pattern for pattern in roles if matches(path, pattern)]
    return max(patterns, key=lambda each: (each.count("."), len(each)), default=None)


def unnamed(paths: Iterable[str], roles: Roles) -> list[str]:
    """The patterns of ``roles`` that name none of ``paths``."""
    paths = list(paths)
    return [pattern for pattern in roles if not any(matches(path, pattern) for path in paths)]
