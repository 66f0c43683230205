"""Every progress bar of the package is made here. ``LOWRANK_PROGRESS=0`` in the environment hides all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

VARIABLE = "LOWRANK_PROGRESS"
OFF = {"0", "false", "no", "off"}


def bars_enabled() -> bool:
    """False where the environment hides all bars. It is read each time, so that a script can set it."""
    return os.environ.get(VARIABLE, "").strip().lower() not in OFF


def bar(
    iterable: Iterable[Any] | None = None,
    description: str | None = None,
    *,
    shown: bool = True,
    **options: Any,
) -> Any:
    """tqdm's bar with its ``options``, on stderr. It is hidden where ``shown`` or the environment says so.

    tqdm's own ``TQDM_DISABLE`` counts too.
    """
    hidden = {} if shown and bars_enabled() else {"disable": True}
    return tqdm(iterable, description, **hidden, **options)
