"""Which values the fields of a policy take. It knows no policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank.models.fused import GROUPS
from lowrank.models.projections import Role


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_rows(said: object) -> bool:
    """Rows by role, as of a fused weight?"""
    return isinstance(said, Mapping) and all(
        role in {*Role, GROUPS} and is_whole(n) for role, n in said.items()
    )


def are_ids(name: object, ids: object) -> bool:
    """The name of an embedding, and rows of it, each once?"""
    if not (isinstance(name, str) and name and isinstance(ids, Sequence) and ids):
        return False
    return all(is_whole(i) and i >= 0 for i in ids) and len(set(ids)) == len(ids)
