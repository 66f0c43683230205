"""What the package says beside its results: the logger "lowrank", and the categories of its warnings.

It installs no handler and sets no level: those are the application's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable, Sequence

from tqdm import tqdm

logger = logging.getLogger("lowrank")
_said: set[Hashable] = set()


class LowrankWarning(UserWarning):
    """The category that every warning of lowrank belongs to."""


class UnusedLayerWarning(LowrankWarning):
    """An adapted layer has no effect: no forward uses it, or the loss does not depend on it."""


class UnsavedParametersWarning(LowrankWarning):
    """Parameters or buffers of the base change, and saving the adapter does not save them."""


def few(names: Sequence[object], most: int = 5) -> str:
    """The first ``most`` of ``names`` in one line, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def show(text: str) -> None:
    """Logs what the user has asked to see, as INFO. Where no logging shows INFO, it is written to stderr.

    A bar that is on the screen stays whole.
    """
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(text)
    else:
        tqdm.write(text, file=sys.stderr)


def once(text: str, about: Hashable = None) -> None:
    """Logs a warning the first time in this process that one comes ``about`` this, by default its text."""
    about = text if about is None else about
    if about not in _said:
        _said.add(about)
        logger.warning(text)
