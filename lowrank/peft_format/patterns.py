"""PEFT's ``rank_pattern`` and ``alpha_pattern``: what a module gets by its path.

The keys come from a file, so that their number and what matching them can cost are bounded.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lowrank.files import AdapterError

MOST_KEYS = 100_000  # a large model has some thousand modules
MOST_EXPRESSIONS = 1_000  # keys that are more than a path
MOST_STEPS = 4 * 10**9  # of matching; ten seconds of it, or less
LOOK_UP = 1_000  # steps that looking up one shape of key is worth, and starting one match

# Length of a key's text → places of its dots → the rest of it → number of the first such key.
Table = dict[int, dict[tuple[int, ...], dict[str, int]]]


class Patterns:
    """Values by pattern. The first key that matches the end of a path counts, as PEFT has it.

    Most keys are paths, in which a dot stands for any character: of these the right ones are looked up. Other
    expressions are tried one by one.

    Raises AdapterError for keys that are no regular expression, too many, or too costly to match.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        if len(values) > MOST_KEYS:
            raise AdapterError(f"{len(values):,} patterns are more than the limit")
        self._values = list(values.values())
        self._ends: Table = {}
        self._whole: Table = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        self._found: dict[str, Any] = {}
        for number, key in enumerate(values):
            text = literal(key.removeprefix("^"))
            if text is None:
                self._expressions.append((number, expression(key)))
                continue
            dots = tuple(i for i, char in enumerate(text) if char is None)
            table = self._whole if key.startswith("^") else self._ends
            rest = "".join(char for char in text if char is not None)
            table.setdefault(len(text), {}).setdefault(dots, {}).setdefault(rest, number)
        if len(self._expressions) > MOST_EXPRESSIONS:
            count = f"{len(self._expressions):,}"
            raise AdapterError(
                f"{count} patterns with alternatives are too many: write out the modules' names"
            )

    def value(self, path: str, otherwise: Any) -> Any:
        """The value of the first key that matches ``path``, or ``otherwise``."""
        if path not in self._found:
            number = self._first(path)
            self._found[path] = None if number is None else self._values[number]
        found = self._found[path]
        return otherwise if found is None else found

    def check_cost(self, paths: Collection[str], name: str) -> None:
        """Raises AdapterError where matching all of ``paths`` could take more than `MOST_STEPS`."""
        costs = [_cost(key.pattern) for _, key in self._expressions]
        steps = 0
        for path in paths:
            steps += sum(LOOK_UP + factor * math.comb(len(path) + stars, stars) for factor, stars in costs)
            steps += LOOK_UP * len(self._whole.get(len(path), ()))
            steps += LOOK_UP * sum(len(self._ends.get(len(end), ())) for end in _dotted_ends(path))
        if steps > MOST_STEPS:
            raise AdapterError(f"{name} would take too long to match: write out the modules' names")

    def _first(self, path: str) -> int | None:
        found = _looked_up(self._whole, path)
        for end in _dotted_ends(path):
            found += _looked_up(self._ends, end)
        first = min(found, default=None)
        for number, key in self._expressions:
            if first is not None and number > first:
                break
            if key.match(path):
                return number
        return first


def _dotted_ends(path: str) -> Iterator[str]:
    start = 0
    while start >= 0:
        yield path[start:]
        start = path.find(".", start) + 1 or -1


def _cost(pattern: str) -> tuple[int, int]:
    """The number of alternatives of a pattern, at most, and that of its parts of any length."""
    groups = pattern.count("(") - 2  # without the two that `expression` adds
    return (1 + pattern.count("|")) ** max(1, groups), len(re.findall(r"[*+{]", pattern))


def _looked_up(table: Table, text: str) -> list[int]:
    """The numbers of the keys that match all of ``text``, the first of each shape."""
    found = []
    for dots, keys in table.get(len(text), {}).items():
        pieces, start = [], 0
        for dot in dots:
            pieces.append(text[start:dot])
            start = dot + 1
        number = keys.get("".join([*pieces, text[start:]]))
        if number is not None:
            found.append(number)
    return found


def literal(key: str) -> list[str | None] | None:
    """The characters that a key without choices matches, None for any; None where it has choices."""
    text: list[str | None] = []
    escaped = False
    for char in key:
        if escaped:
            if char.isalnum():
                return None
            text.append(char)
        elif char in "*+?{}[]()|^$":
            return None
        elif char != "\\":
            text.append(None if char == "." else char)
        escaped = not escaped and char == "\\"
    return None if escaped or not text else text


def expression(key: str) -> re.Pattern[str]:
    """A key of ``rank_pattern`` or ``alpha_pattern`` as PEFT matches it: with the end of a path.

    One whose matching could take exponential time raises AdapterError.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", key).replace("(?:", "(")
    choices = len(re.findall(r"[*+?{]", plain))
    nested = re.search(r"\)[*+?{]|\(\?", plain) or re.search(r"\\[1-9]", key)
    if nested or choices > 4 or plain.count("(") > 3 or len(key) > 500:
        raise AdapterError(f"the pattern {shortened(key)} is too complex: write out the modules' names")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"the pattern {shortened(key)} is not a regular expression: {error}") from error


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"
