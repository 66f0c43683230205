"""A run in TensorBoard: ``fit(callbacks=[TensorBoard("runs/first")])``. Needs the tensorboard package."""

from __future__ import annotations

import math
from os import PathLike, fspath
from typing import Any

from lowrank.train.callbacks import Callback, Watched
from lowrank.train.history import Record


class TensorBoard(Callback):
    """Writes each step's numbers as scalars: ``train/loss``, ``train/lr``, …, ``evaluate/<name>``.

    Numbers that are not finite are left out. After a continued run the steps go on where they were.

    Args:
        folder: where the event file goes.
        writer: what has ``add_scalar(tag, value, step)`` and ``close()``; by default PyTorch's own, from
            ``torch.utils.tensorboard``, which needs ``pip install lowrank-torch[tensorboard]``.

    Raises:
        ImportError: the package is missing.
    """

    SCALARS = ("loss", "lr", "grad_norm", "tokens_per_second")

    def __init__(self, folder: str | PathLike[str], writer: Any = None) -> None:
        self.writer = _writer(fspath(folder)) if writer is None else writer

    def after_step(self, run: Watched, record: Record) -> None:
        scalars = {f"train/{name}": getattr(record, name) for name in self.SCALARS}
        scalars |= {f"evaluate/{name}": value for name, value in record.evaluation.items()}
        for tag, value in scalars.items():
            if math.isfinite(value):
                self.writer.add_scalar(tag, value, record.step)

    def at_end(self, run: Watched) -> None:
        self.writer.close()


def _writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard needs its package: pip install 'lowrank-torch[tensorboard]'"
        ) from error
    return SummaryWriter(folder)
