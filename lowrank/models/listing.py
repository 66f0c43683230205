"""Names in messages: many in one line, large ones never cut off, and those nearest to what was asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import nn

from lowrank.models.patterns import parts, starred

LARGE = 0.01  # of the model's parameters


def listed(modules: Iterable[str], large: Collection[str] = ()) -> str:
    """``head, layers.*.mlp.gate (12)``: modules that differ by numbers only are counted.

    Six kinds, those that hold a ``large`` module first, and all of these.
    """
    kinds: dict[str, list[str]] = {}
    for module in dict.fromkeys(modules):
        kinds.setdefault(starred(module), []).append(module)
    count = max(6, sum(any(module in large for module in held) for held in kinds.values()))
    if len(kinds) > count:
        kinds = dict(sorted(kinds.items(), key=lambda kind: not any(module in large for module in kind[1])))
    shown = [held[0] if len(held) == 1 else f"{pattern} ({len(held)})" for pattern, held in kinds.items()]
    return ", ".join(shown[:count]) + (f" and {len(shown) - count} kinds more" if len(shown) > count else "")


def large_weights(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of ``names``, modules or weights, that hold more than `LARGE` of the model's parameters."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())

    def numbers(held: Iterable[nn.Parameter]) -> int:
        lazy = nn.parameter.UninitializedParameter  # has no shape yet
        return sum(parameter.numel() for parameter in held if not isinstance(parameter, lazy))

    def size(name: str) -> int:
        module = modules.get(name)
        return numbers([parameters[name]] if module is None else module.parameters(recurse=False))

    whole = numbers(parameters.values())

    return {name for name in names if size(name) > LARGE * whole}


def nearest(name: str, paths: Sequence[str]) -> str:
    """`; the nearest names are …`, or `name is` for one, by the suffixes of as many parts as ``name`` has."""
    count = len(parts(name))
    suffixes = list(dict.fromkeys(".".join(parts(path)[-count:]) for path in paths))
    near = difflib.get_close_matches(name, suffixes, n=4, cutoff=0.3) or suffixes[:8]
    return f"; the nearest {'name is' if len(near) == 1 else 'names are'} {', '.join(near)}"


def as_names(names: str | Sequence[str], what: str) -> list[str]:
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, Iterable) or not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{what}: expected names, got {names!r}")
    return list(listed)


def under(paths: Iterable[str]) -> Callable[[str], bool]:
    """Is a path one of ``paths``, or does it lie in one? The answer takes as long for one as for many."""
    held = frozenset(paths)

    def inside(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[:i]) in held for i in range(1, len(parts) + 1))

    return inside
