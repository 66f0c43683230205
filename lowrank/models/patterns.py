"""How a user's pattern names a path, and how a label after it names rows of a weight. It knows no model."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

SHARED = "shared."  # what the label of rows that all experts share begins with


def parts(name: str) -> list[str]:
    """``name`` at its dots. A dot in a label, as in ``gate_up_proj[0.gate]``, divides nothing."""
    return re.split(r"\.(?![^\[\]]*\])", name) if "[" in name else name.split(".")  # which is much faster


def matches(path: str, pattern: str) -> bool:
    """Does the dotted-suffix ``pattern``, with ``*`` inside its parts, name ``path``?"""
    own, wanted = parts(path), parts(pattern)
    return len(own) >= len(wanted) and all(map(_is, own[-len(wanted) :], wanted))


def matches_label(path: str, label: str, pattern: str) -> bool:
    """Does ``pattern``, such as ``c_attn[query]`` or ``gate_up_proj[*.gate]``, name ``label`` of ``path``?

    ``[shared.gate]``, the label of an adapter that experts share, names each of these experts too.
    """
    head, bracket, wanted = pattern.removesuffix("]").rpartition("[")
    if not (label and head and bracket and pattern.endswith("]")) or not matches(path, head):
        return False
    every = f"*.{wanted.removeprefix(SHARED)}" if wanted.startswith(SHARED) else wanted
    return _is(label, wanted) or _is(label, every)


def starred(name: str) -> str:
    """``name`` with ``*`` for the numbers in it: a pattern that names it."""
    return re.sub(r"(?<![^.\[])\d+(?![^.\]])", "*", name)


def _is(part: str, wanted: str) -> bool:
    return part == wanted or fnmatchcase(part, wanted)


def suffixes(path: str) -> list[str]:
    """The last part of ``path``, its last two, and so on: the patterns without wildcards that name it."""
    own = path.split(".")
    return [".".join(own[-i:]) for i in range(1, len(own) + 1)]
