"""Where statistics come from: those at hand, the weights, or the user's batches.

What does not fit in memory at once is measured in parts. What statistics are for, it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, Mask
from lowrank.calibration import calibrate, predicted_bytes
from lowrank.calibration.statistics import KINDS, OF_WEIGHTS, ProjectionStatistics, Statistics
from lowrank.models.fingerprint import of_projections
from lowrank.models.projections import Projection, Role
from lowrank.processes import Processes
from lowrank.progress import bar

MATRICES = frozenset({"covariance", "moment", "gradient"})  # what takes memory


@dataclass
class Source:
    """What the user gave to measure with; the arguments are those of `wrap_model`."""

    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    mask: Mask | None = None
    statistics: Statistics | None = None
    memory: int | None = None
    progress: bool = True

    def measure(self, model: nn.Module, needs: Mapping[Projection, frozenset[str]]) -> Statistics:
        """Statistics with all that each projection needs; what is not at hand is measured in one pass.

        Raises:
            ValueError: an unknown need, one for batches where there are none, or statistics of another model.
        """
        every = frozenset[str]().union(*needs.values())
        if unknown := every - KINDS - OF_WEIGHTS:
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(KINDS | OF_WEIGHTS)}")
        found = self.statistics or Statistics({})
        found.check(model, list(needs))
        missing = {p: frozenset(n for n in each if found.lacks([p], n)) for p, each in needs.items()}
        if spectra := [p for p, each in missing.items() if each & OF_WEIGHTS]:
            found = found.merged(self._of_weights(model, spectra))
        wanted = {p: each - OF_WEIGHTS for p, each in missing.items() if each - OF_WEIGHTS}
        if wanted:
            _check_measurable(wanted)
            if self.batches is None:
                names = " and ".join(sorted(frozenset().union(*wanted.values())))
                raise ValueError(f"this policy measures {names}: pass calibration batches=")
            measured = calibrate(
                model,
                list(wanted),
                wanted,
                self.batches,
                loss=self.loss,
                mask=self.mask,
                progress=self.progress,
            )
            found = found.merged(measured)
        return found

    @property
    def shows(self) -> bool:
        """Does this process show bars? Of several the first does."""
        return self.progress and Processes().first

    def fits(self, needs: Mapping[Projection, frozenset[str]]) -> bool:
        """Can all of it be held at once?"""
        return self.memory is None or predicted_bytes(list(needs), needs) <= self.memory

    def parts(
        self, model: nn.Module, needs: Mapping[Projection, frozenset[str]]
    ) -> Iterator[tuple[list[Projection], Statistics]]:
        """Some projections at a time with their statistics, which may be dropped before the next.

        Raises:
            ValueError: several passes are needed, and the batches can be read only once.
        """
        chunks = self._chunks(needs)
        if len(chunks) > 1:
            self.check_rereadable(needs)
        for chunk in chunks:
            yield chunk, self.measure(model, {p: needs[p] for p in chunk})

    def check_rereadable(self, needs: Mapping[Projection, frozenset[str]]) -> None:
        """Raises ValueError for batches that can be read once, which is not enough for ``needs``."""
        if self.batches is not None and iter(self.batches) is self.batches:
            size = predicted_bytes(list(needs), needs)
            raise ValueError(
                f"{size:,} bytes of statistics exceed memory={self.memory:,}, so they go in parts, and the "
                "batches must be read several times: pass a list or a DataLoader, or allow more memory"
            )

    def _chunks(self, needs: Mapping[Projection, frozenset[str]]) -> list[list[Projection]]:
        """Runs of projections that fit the memory; one parent's stay together, since they share inputs."""
        if self.fits(needs):
            return [list(needs)]
        families: dict[str, list[Projection]] = {}
        for p in needs:
            families.setdefault(f"{p.module.rpartition('.')[0]}:{p.in_features}", []).append(p)
        chunks: list[list[Projection]] = []
        for family in families.values():
            if chunks and self.fits({p: needs[p] for p in chunks[-1] + family}):
                chunks[-1] += family
            else:
                chunks.append(family)
        return chunks

    def _of_weights(self, model: nn.Module, projections: Sequence[Projection]) -> Statistics:
        shown = bar(projections, "singular values", shown=self.shows, delay=2, leave=False)
        spectra = {p: ProjectionStatistics(spectrum=_singular_values(model, p)) for p in shown}
        return Statistics(spectra, of_projections(model, projections))


def _check_measurable(wanted: Mapping[Projection, frozenset[str]]) -> None:
    """Raises ValueError for projections that calibration does not watch: it does so for linear ones only."""
    for p, needs in wanted.items():
        if p.shared > 1 and "sensitivity" in needs:
            raise ValueError(
                f"{p.name}: sensitivity is of one weight, and {p.shared} experts share this adapter: choose "
                'an allocator that needs none, as Uniform(), or experts="each"'
            )
        if p.role in (Role.EMBEDDING, Role.CONV):
            raise ValueError(
                f"{p.name}: {' and '.join(sorted(needs))} cannot be measured of a projection of role "
                f"{p.role}: choose an initializer and an allocator that need no batches, as Kaiming() and "
                "Uniform(), or leave it out of target="
            )


def _singular_values(model: nn.Module, p: Projection) -> Tensor:
    """(min(out, in),) fp64, descending; small ones as accurate as the square root of fp64's."""
    weight = p.weight(model)
    if not weight.isfinite().all():
        raise ValueError(f"{p.name}: its weight contains NaN or Inf")
    tall = weight.double() if weight.shape[0] >= weight.shape[1] else weight.double().T
    return torch.linalg.eigvalsh(tall.T @ tall).clamp_min(0).sqrt().flip(0)
