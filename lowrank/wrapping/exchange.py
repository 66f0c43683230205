"""Replaces objects inside the containers that hold them: how a layer is exchanged wherever a module keeps it.

It walks dicts, lists, sets, tuples, `functools.partial` and bound methods. It does not look into other
objects, nor into closures.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

DEPTH = 10  # of containers within containers


class Exchange:
    """Puts new modules in the place of old ones: in place in what can change, else in a copy."""

    def __init__(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        self.replacements = replacements
        self.seen: dict[int, Any] = {}  # and kept alive, so that no other object gets its id

    def inside(self, held: Any, depth: int = 0) -> None:
        """Exchanges what the dict, list or set ``held`` holds, at any depth."""
        if id(held) in self.seen:
            return
        self.seen[id(held)] = held
        if isinstance(held, dict):
            for key, value in list(held.items()):
                new = self.new(value, depth)
                if new is not value:
                    held[key] = new
            keys = [self.new(key, depth) for key in held]
            if any(new is not key for new, key in zip(keys, held, strict=True)):
                items = list(zip(keys, held.values(), strict=True))
                held.clear()
                held.update(items)
        elif isinstance(held, list):
            for i, value in enumerate(held):
                new = self.new(value, depth)
                if new is not value:
                    held[i] = new
        else:
            for value in list(held):
                new = self.new(value, depth)
                if new is not value:
                    held.remove(value)
                    held.add(new)

    def new(self, held: Any, depth: int = 0) -> Any:
        """What is to be in the place of ``held``: itself, where nothing in it is exchanged."""
        if isinstance(held, nn.Module):
            return self.replacements.get(held, held)
        if depth >= DEPTH:
            return held
        if isinstance(held, dict | list | set):
            self.inside(held, depth + 1)
        elif isinstance(held, tuple | frozenset):
            parts = [self.new(each, depth + 1) for each in held]
            if any(part is not each for part, each in zip(parts, held, strict=True)):
                return held._make(parts) if hasattr(held, "_make") else type(held)(parts)
        elif type(held) is partial:
            parts = [self.new(each, depth + 1) for each in (held.func, held.args, held.keywords)]
            if parts[0] is not held.func or parts[1] is not held.args:
                made = partial(parts[0], *parts[1], **parts[2])
                made.__dict__.update(held.__dict__)
                return made
        elif isinstance(held, MethodType):
            owner = (
                self.new(held.__self__, depth + 1) if isinstance(held.__self__, nn.Module) else held.__self__
            )
            if owner is not held.__self__:
                return getattr(owner, held.__name__, held)
        return held
