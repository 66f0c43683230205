"""SIGINT and SIGTERM as a wish that the run takes note of, and fulfils at the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal stopped the run after a step, and its checkpoint was saved. The exit code is 128 + signal.

    ``message`` says where it is, and ``history`` has the steps so far.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Wish:
    """``number`` is the first signal that came, or 0."""

    number = 0


@contextmanager
def noted(enabled: bool = True) -> Iterator[Wish]:
    """Inside, the first signal is noted; a second of the same kind does what it did before.

    What was noted and led to no exception, since the run was over anyway, is sent again afterwards. Python
    lets only the main thread have handlers: elsewhere signals are left as they are.
    """
    wish = Wish()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before: dict[int, Any] = {int(number): signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        wish.number = wish.number or number
        signal.signal(number, before[number])

    for each in before:
        signal.signal(each, note)
    try:
        yield wish
    finally:
        for each in before:
            signal.signal(each, before[each])
    if wish.number:
        signal.raise_signal(wish.number)
