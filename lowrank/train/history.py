"""What a training run showed, step by step, and its file: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import overload

from lowrank.files import write


@dataclass(frozen=True)
class Record:
    """One optimizer step.

    step, epoch: counted from 1.
    loss: mean over the step's batches, before its update.
    lr: of the first parameter group.
    grad_norm: before clipping.
    tokens_per_second: padding apart; examples, where batches have no tokens.
    seconds: of training since the start, evaluations apart.
    evaluation: what ``evaluate`` gave after this step; empty where it was not asked.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds: float
    evaluation: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class History(Sequence[Record]):
    """The records of a run, in order."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self.records = list(records)

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
        write(Path(path), "".join(record.to_json() + "\n" for record in self.records).encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> History:
        """Read what ``save`` or ``fit(log=...)`` wrote; a last line that was cut short is left out.

        Raises ValueError, with the line's number, for anything else that is no record.
        """
        lines = Path(path).read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(Record(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is not a record of a training run: {error}"
                ) from error
        return cls(records)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> History: ...
    def __getitem__(self, index: int | slice) -> Record | History:
        return History(self.records[index]) if isinstance(index, slice) else self.records[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self.records == other.records

    def __repr__(self) -> str:
        if not self.records:
            return "History(no steps)"
        first, last = self.records[0], self.records[-1]
        return f"History({len(self)} steps, loss {first.loss:.4g} → {last.loss:.4g}, {last.seconds:.1f} s)"
