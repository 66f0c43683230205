"""State of an object that holds nothing but what it can find again, such as a copy made for speed."""

from __future__ import annotations

from typing import Any


class Transient:
    """Belongs to one object, and is not copied or pickled along with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Transient:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()
