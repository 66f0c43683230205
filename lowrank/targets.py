"""Which projections a policy means: targets, exclusions, and the error where a name means nothing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lowrank.projections import (
    Projection,
    Role,
    find_projections,
    matches,
    output_heads,
    undivided,
)

Target = str | Sequence[str] | Callable[[Projection], bool]


class Selection(NamedTuple):
    """The projections that a policy means, and what its plan should say of those that it leaves out."""

    projections: list[Projection]
    notes: list[str]


def select(
    model: nn.Module,
    target: Target,
    exclude: Sequence[str] = (),
    train: Sequence[str] = (),
    fused: Mapping[str, Mapping[str, int]] | None = None,
) -> Selection:
    """The projections of ``model`` that ``target`` means, in the model's order.

    Raises:
        ValueError: nothing is asked for, a name matches nothing (with the nearest names), or a fused
            weight among them cannot be divided.
    """
    fused = fused or {}
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in fused:
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(f"fused={pattern!r} names no module{_nearest(pattern, paths)}")
    known = find_projections(model, fused)
    if not known:
        raise ValueError(f"{type(model).__name__} has no linear projection to adapt")
    inside_trained = _under(trained_modules(model, train))
    heads = output_heads(model)
    known = [p for p in known if not inside_trained(p.module)]

    if callable(target):
        chosen = {p for p in known if target(p)}
        if not chosen:
            raise ValueError(f"the target {target!r} accepts none of the model's {len(known)} projections")
    else:
        names = _as_names(target, "target")
        if not names:
            raise ValueError('no target: name projections, a role such as "query", or "all-linear"')
        chosen = set()
        for name in names:
            chosen |= _named(name, known, heads, model, fused)
    for name in _as_names(exclude, "exclude"):
        chosen -= _named(name, known, heads, model, fused, excluding=True)
    if not chosen:
        raise ValueError(f"exclude={_as_names(exclude, 'exclude')} leaves nothing of target={target!r}")
    problems = [reason for p, reason in undivided(model, fused).items() if p in chosen]
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return Selection([p for p in known if p in chosen], [])


def trained_modules(model: nn.Module, train: Sequence[str]) -> list[str]:
    """Paths of the modules that ``train`` names; a path below another of them is left out."""
    paths = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for pattern in _as_names(train, "train"):
        hits = [path for path in paths if matches(path, pattern)]
        if not hits:
            raise ValueError(f"train={pattern!r} names no module{_nearest(pattern, paths)}")
        for hit in hits:
            kind = type(model.get_submodule(hit))
            if kind.forward is nn.Module.forward:
                raise ValueError(
                    f"train={pattern!r} names {hit}, a {kind.__name__}, which is never called: "
                    f"name what it holds, such as {pattern + '.*'!r}"
                )
        found += [hit for hit in hits if hit not in found]
    return [path for path in found if not _under([p for p in found if p != path])(path)]


def _named(
    name: str,
    known: Sequence[Projection],
    heads: set[str],
    model: nn.Module,
    fused: Mapping[str, Mapping[str, int]],
    *,
    excluding: bool = False,
) -> set[Projection]:
    if name == "all-linear":
        return {p for p in known if p.module not in heads}
    if name in Role.__members__.values():
        hits = {p for p in known if p.role == name and p.module not in heads}
        if hits:
            return hits
    hits = {p for p in known if _is_called(p, name)}
    if excluding:
        inside = [path for path, _ in model.named_modules() if path and matches(path, name)]
        hits |= {p for p in known if _under(inside)(p.module)}
        if inside:
            return hits
    if hits:
        return hits
    reasons = list(undivided(model, fused).values())
    because = f"; a fused weight could not be divided: {reasons[0]}" if reasons else ""
    what = "exclude" if excluding else "target"
    suggestions = _nearest(name, [p.module for p in known] + [p.name for p in known])
    raise ValueError(f"{what}={name!r} matches no projection{suggestions}{because}")


def _is_called(projection: Projection, name: str) -> bool:
    full = f"{projection.module}.{projection.param}"
    return projection.name == name or matches(projection.module, name) or matches(full, name)


def _as_names(names: str | Sequence[str], what: str) -> list[str]:
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, Iterable) or not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{what} takes names, not {names!r}")
    return list(listed)


def _under(paths: Sequence[str]) -> Callable[[str], bool]:
    return lambda path: any(path == above or path.startswith(above + ".") for above in paths)


def _nearest(name: str, paths: Sequence[str]) -> str:
    """`; the nearest names are …`, by the suffixes of as many parts as ``name`` has."""
    parts = name.count(".") + 1
    suffixes = list(dict.fromkeys(".".join(path.split(".")[-parts:]) for path in paths))
    near = difflib.get_close_matches(name, suffixes, n=4, cutoff=0.3) or suffixes[:8]
    return f"; the nearest names are {', '.join(near)}"
