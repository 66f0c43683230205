"""Strategies as JSON: dataclasses of `lowrank.init` and `lowrank.allocate` by name, others as a record.

What cannot be made again is kept as it was read, prints as what it was, and is written back the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from typing import Any

from lowrank import allocate, init
from lowrank.models.projections import Role

LONGEST = 2000  # characters of what an initializer prints as


@dataclass(frozen=True)
class Recorded:
    """An initializer that cannot be made here: of another library, or of another version of this one.

    It prints as what it was and is written as it was read. A plan may hold it, since the adapters that it
    started need it no more; only starting new ones raises ValueError.

    Args:
        name: of its class.
        text: what it printed as.
        record: its JSON.
    """

    name: str
    text: str
    record: str

    def __repr__(self) -> str:
        return self.text

    @property
    def needs(self) -> frozenset[str]:
        raise ValueError(
            f"the plan's initializer {self.text:.200} cannot be made here ({self.name!r} is unknown, or its "
            "fields are others now): set another, such as plan.init = lowrank.init.Kaiming()"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.needs


def encode(value: Any, *, strict: bool = False) -> Any:
    """Plain data for any value: what `decode` cannot make again is recorded by class and ``repr``.

    Raises:
        ValueError: ``strict``, and there is such a value.
    """
    if isinstance(value, Recorded):
        return json.loads(value.record)
    if isinstance(value, Role):
        return {"role": value.value}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value)):
        return value
    if isinstance(value, (tuple, list)):
        return [encode(item, strict=strict) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": [[encode(k, strict=strict), encode(v, strict=strict)] for k, v in value.items()]}
    kind = type(value)
    if is_dataclass(value) and belongs(value, "lowrank.init.", "lowrank.allocate."):
        return {
            "class": kind.__name__,
            "fields": {
                f.name: encode(getattr(value, f.name), strict=strict) for f in fields(value) if f.init
            },
        }
    if strict:
        raise ValueError(f"{kind.__qualname__} cannot be written as JSON")
    try:
        text = repr(value)
    except Exception:  # somebody else's code, which is not to stop a save
        text = object.__repr__(value)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "repr": text[:LONGEST]}


def decode(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(decode(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "role" in data:
        return Role(data["role"])
    if "mapping" in data:
        return {decode(k): decode(v) for k, v in data["mapping"]}
    name = typed(data["class"], str)
    try:
        return _made(name, data["fields"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return Recorded(name, _printed(name, data), json.dumps(data))


def _made(name: str, given: Mapping[str, Any]) -> Any:
    for offered in (init, allocate):
        if name in offered.__all__ and hasattr(getattr(offered, name), "needs"):
            return getattr(offered, name)(**{key: decode(value) for key, value in given.items()})
    raise ValueError(f"{name} is unknown to this version")


def _printed(name: str, data: Mapping[str, Any]) -> str:
    given = data.get("fields")
    said = ", ".join(f"{key}={value}" for key, value in given.items()) if isinstance(given, dict) else ""
    text = data.get("repr")
    return (text if isinstance(text, str) else f"{name}({said})")[:LONGEST]


def belongs(value: Any, *rooms: str) -> bool:
    return type(value).__module__.startswith(rooms)


def typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {getattr(kind, '__name__', 'a number')}, got {value!r}")
    return value
