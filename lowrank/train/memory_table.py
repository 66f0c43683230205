"""What a training step holds, as data and as a table. `memory` finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class MemoryReport:
    """What a training step holds, in bytes. ``print`` shows it as a table.

    weights: of the base: parameters and buffers that are not trained.
    adapters: what is trained, and what adapters keep beside it.
    gradients, optimizer: of what is trained.
    activations: kept for backward, at the end of forward.
    at_peak: how much of each of these is held at the moment when most is held; ``temporary`` is what
        operations need in passing.
    free: bytes of the device that the whole may take; None where it is not known.
    helps: what would make it smaller, and the peak then.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    at_peak: Mapping[str, int]
    free: int | None = None
    helps: tuple[tuple[str, int], ...] = ()
    title: str = "a training step"

    @property
    def peak(self) -> int:
        """The most bytes that are held at once."""
        return sum(self.at_peak.values())

    @property
    def fits(self) -> bool:
        """Is the peak no more than what is free? True where that is not known."""
        return self.free is None or self.peak <= self.free

    def to_json(self) -> dict[str, Any]:
        """Plain data, in bytes; each of ``helps`` has what it is, the peak then, and what that saves."""
        helps = [{"what": what, "peak": peak, "saves": self.peak - peak} for what, peak in self.helps]
        return {
            **asdict(self),
            "at_peak": dict(self.at_peak),
            "peak": self.peak,
            "fits": self.fits,
            "helps": helps,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryReport:
        """What `to_json` gave. Raises LookupError or TypeError where it is something else."""
        given = {field.name: data[field.name] for field in fields(cls)}
        helps = tuple((help["what"], help["peak"]) for help in given["helps"])
        return cls(**{**given, "at_peak": dict(given["at_peak"]), "helps": helps})

    def __str__(self) -> str:
        """A table: what each part takes in all, and at the peak."""
        rows = [("MiB", "in all", "at the peak")]
        for name, held in self.at_peak.items():
            whole = getattr(self, name, None)
            rows.append((name, "" if whole is None else _mebibytes(whole), _mebibytes(held)))
        rows.append(("peak", "", _mebibytes(self.peak)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in rows
        ]
        rule = "  ".join("-" * width for width in widths)
        lines = [f"Memory of {self.title}", *lines[:1], rule, *lines[1:-1], rule, lines[-1]]
        if self.free is not None:
            verdict = "it fits" if self.fits else "it does not fit"
            lines.append(f"free on the device: {_mebibytes(self.free)} MiB: {verdict}")
        if self.helps:
            lines.append("what would help, each alone, the peak then, and what that saves:")
            lines += [
                f"  {what}: {_mebibytes(peak)} MiB, {_mebibytes(self.peak - peak)} less"
                for what, peak in self.helps
            ]
        return "\n".join(line.rstrip() for line in lines)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}"
