"""Lets a wrapped layer take the state dict of its base: for weights that arrive after wrapping.

It renames keys in the dict that `nn.Module.load_state_dict` hands around, and leaves the layer's own alone.
"""

from __future__ import annotations

from typing import Any


def move_below_base(state_dict: dict[str, Any], prefix: str, own: tuple[str, ...]) -> list[str]:
    """Renames ``prefix + name`` to ``prefix + "base." + name`` and returns the names.

    Args:
        state_dict: changed in place.
        prefix: of the wrapped layer.
        own: how names begin that are the wrapped layer's already.
    """
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    moved = [name for name in names if not name.startswith(own)]
    for name in moved:
        state_dict[f"{prefix}base.{name}"] = state_dict.pop(prefix + name)
    return moved
