"""What a run shows while it runs: the bar and the log, in the process that writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path

import torch

from lowrank.files import write
from lowrank.progress import bar
from lowrank.train.history import Record, memory_line
from lowrank.train.memory_table import MemoryReport
from lowrank.train.run import Run


class Reports:
    """Called with each step's record."""

    def __init__(self, run: Run, log: str | PathLike[str] | None, progress: bool) -> None:
        self._scope = ExitStack()
        self._file = None
        if log is not None:
            path = Path(log)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() or not path.exists():  # whole or not at all: a full disk leaves the old one
                write(path, "".join(line + "\n" for line in run.history.lines()).encode())
            self._file = self._scope.enter_context(path.open("a", buffering=1, encoding="utf-8"))
        self.bar = self._scope.enter_context(
            bar(total=run.schedule.steps, initial=run.step, unit="step", shown=progress)
        )

    def __call__(self, record: Record) -> None:
        if self._file is not None:
            try:
                self._file.write(record.to_json() + "\n")
            except OSError as error:
                with suppress(OSError):  # it tries again to write what is left
                    self._file.close()
                raise OSError(
                    error.errno,
                    f"the log {self._file.name} cannot be written after step {record.step}: "
                    f"{error.strerror}; checkpoints that were saved before are still there",
                ) from error
        self.bar.set_postfix(
            loss=f"{record.loss:.4f}",
            lr=f"{record.lr:.1e}",
            tokens_s=f"{record.tokens_per_second:.0f}",
            memory=memory(),
            refresh=False,
        )
        self.bar.update()

    def memory(self, report: MemoryReport | None) -> None:
        """Puts the memory of a step into the log, where it is known."""
        if self._file is not None and report is not None:
            self._file.write(memory_line(report) + "\n")

    def close(self) -> None:
        self._scope.close()


@contextmanager
def reporting(run: Run, log: str | PathLike[str] | None, progress: bool) -> Iterator[Reports]:
    """The log has the steps of ``run`` that there are already, and the bar begins after them."""
    reports = Reports(run, log, progress)
    try:
        yield reports
    finally:
        reports.close()


def memory() -> str:
    """The most that was allocated on the CUDA device, or else that the process had in memory, in GB."""
    if torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}GB"
    try:
        import resource
    except ImportError:  # Windows
        return "?"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f}GB"
