"""What a training run showed, step by step, and its file: one JSON object a line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import Any, overload

from lowrank.files import write
from lowrank.plots import curves
from lowrank.train.memory_table import MemoryReport


@dataclass(frozen=True)
class Record:
    """One optimizer step.

    step, epoch: counted from 1.
    loss: mean over the terms of the step's batches, before its update; NaN where they had none.
    lr: of the first parameter group.
    grad_norm: before clipping; not finite where the gradient overflowed.
    tokens_per_second: padding apart; examples, where batches have no tokens.
    seconds: of training since the start, evaluations apart.
    evaluation: what ``evaluate`` gave after this step; empty where it was not asked.
    skipped: why the step updated nothing, "no labels" or "overflow" (of a scaled float16 gradient); empty
        where it did.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds: float
    evaluation: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""

    def to_json(self) -> str:
        """One line. A number that is not finite, which JSON does not have, is null, and NaN when read."""
        return json.dumps(
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in asdict(self).items()
            }
        )

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises ValueError or TypeError where ``line`` is no record."""
        values: dict[str, Any] = json.loads(line)
        numbers: dict[str, Any] = {key: math.nan for key, value in values.items() if value is None}
        return cls(**{**values, **numbers})


class History(Sequence[Record]):
    """The records of a run, in order.

    learning_rate: the peak rate of the groups without an ``lr`` of their own, given or measured; None where
        it is not known, as in a history that was read from a file.
    memory: what a step was to take, where ``fit(report=True)`` told it; else None.
    """

    def __init__(
        self,
        records: Sequence[Record] = (),
        learning_rate: float | None = None,
        memory: MemoryReport | None = None,
    ) -> None:
        self.records = list(records)
        self.learning_rate = learning_rate
        self.memory = memory

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]

    @property
    def evaluations(self) -> dict[int, Mapping[str, float]]:
        """What was measured, by the step after which it was."""
        return {record.step: record.evaluation for record in self.records if record.evaluation}

    def append(self, record: Record) -> None:
        self.records.append(record)

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON lines, the format of ``fit(log=...)`` too."""
        write(Path(path), "".join(line + "\n" for line in self.lines()).encode())

    def lines(self) -> Iterator[str]:
        """The lines of its file: the memory, where it is known, and the records."""
        if self.memory is not None:
            yield memory_line(self.memory)
        yield from (record.to_json() for record in self.records)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> History:
        """Read what ``save`` or ``fit(log=...)`` wrote; a last line that was cut short is left out.

        Raises ValueError, with the line's number, for anything else that is no record.
        """
        lines = Path(path).read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        records = []
        memory = None
        for number, line in enumerate(lines, start=1):
            try:
                data = json.loads(line)
                if data.keys() == {"memory"}:
                    memory = MemoryReport.from_json(data["memory"])
                else:
                    records.append(Record.from_json(line))
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                raise ValueError(
                    f"{path}, line {number}, is not a record of a training run: {error}"
                ) from error
        return cls(records, memory=memory)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write a table with a line for each step; each score of ``evaluate`` has a column of its own.

        What was not measured is empty, and a number that is not finite is "nan" or "inf".
        """
        scores = list(dict.fromkeys(name for record in self for name in record.evaluation))
        names = [field.name for field in fields(Record) if field.name != "evaluation"]
        text = StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*names, *(f"evaluation.{name}" for name in scores)])
        for record in self:
            row = [getattr(record, name) for name in names]
            table.writerow([*row, *(record.evaluation.get(name, "") for name in scores)])
        write(Path(path), text.getvalue().encode())

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """A figure of the loss, the learning rate, and what ``evaluate`` gave, over the steps.

        Needs matplotlib. It is written to ``path``, whose ending says the format, where there is one, and
        returned. Raises ValueError where there are no steps.
        """
        if not self.records:
            raise ValueError("the history has no steps to plot")
        steps = [float(record.step) for record in self]
        window = max(1, len(self) // 20)
        smooth = [_mean(self.losses[max(0, i - window + 1) : i + 1]) for i in range(len(self))]
        losses = {"loss": (steps, self.losses)}
        if window > 1:
            losses[f"mean of {window} steps"] = (steps, smooth)
        panels: list[tuple[str, Any]] = [("loss", losses)]
        for name in dict.fromkeys(name for scores in self.evaluations.values() for name in scores):
            found = {float(step): scores[name] for step, scores in self.evaluations.items() if name in scores}
            panels.append((name, {name: (list(found), list(found.values()))}))
        panels.append(("learning rate", {"lr": (steps, [record.lr for record in self])}))
        return curves(panels, path)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> History: ...
    def __getitem__(self, index: int | slice) -> Record | History:
        if isinstance(index, slice):
            return History(self.records[index], self.learning_rate, self.memory)
        return self.records[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, History):
            return False
        return [record.to_json() for record in self] == [record.to_json() for record in other]

    def __repr__(self) -> str:
        if not self.records:
            return "History(no steps)"
        first, last = self.records[0], self.records[-1]
        return f"History({len(self)} steps, loss {first.loss:.4g} → {last.loss:.4g}, {last.seconds:.1f} s)"


def memory_line(report: MemoryReport) -> str:
    """The line of a history's file that has the memory of a step."""
    return json.dumps({"memory": report.to_json()})


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
