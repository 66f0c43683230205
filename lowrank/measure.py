"""Where statistics come from: those at hand, the weights, or the user's batches.

What does not fit in memory at once is measured in parts. What statistics are for, it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.batches import Loss, Mask
from lowrank.calibrate import calibrate, predicted_bytes
from lowrank.fingerprint import of_projections
from lowrank.products import full_precision
from lowrank.projections import Projection
from lowrank.statistics import KINDS, OF_WEIGHTS, ProjectionStatistics, Statistics

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

    def measure(
        self, model: nn.Module, projections: Sequence[Projection], needs: frozenset[str]
    ) -> Statistics:
        """Statistics with all of ``needs``: what is not at hand is measured, in one pass over the batches.

        Raises:
            ValueError: an unknown need, one for batches where there are none, or statistics of another model.
        """
        if unknown := needs - KINDS - OF_WEIGHTS:
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(KINDS | OF_WEIGHTS)}")
        found = self.statistics or Statistics({})
        found.check(model, projections)
        missing = {need for need in needs if found.lacks(projections, need)}
        if spectra := missing & OF_WEIGHTS:
            found = found.merged(self._of_weights(model, projections))
        if wanted := missing - spectra:
            if self.batches is None:
                names = " and ".join(sorted(wanted))
                raise ValueError(f"this policy measures {names}: pass calibration batches=")
            measured = calibrate(
                model,
                projections,
                wanted,
                self.batches,
                loss=self.loss,
                mask=self.mask,
                progress=self.progress,
            )
            found = found.merged(measured)
        return found

    def sketch(self, model: nn.Module, ranks: Mapping[Projection, int], factor: int, seed: int) -> Statistics:
        """Sketches ``(W·C)ᵀ·U`` that hold the first ``ranks[p]`` right singular vectors of W·C.

        A randomized SVD (Halko, Martinsson & Tropp 0909.4061) of factor·rank columns and one power iteration
        that never forms C: each product with C is a pass over the batches, three in all, and takes 2·in·q of
        memory for each projection instead of in·in.
        """
        if self.batches is None:
            raise ValueError("this policy measures sketch: pass calibration batches=")
        self.check_rereadable(list(ranks), frozenset())
        draw, columns = torch.Generator().manual_seed(seed), {}
        for p, rank in ranks.items():
            noise = torch.randn(p.out_features, min(factor * rank, *p.shape), generator=draw)
            columns[p] = _times_weight(model, p, noise, transposed=True)
        # Popped, so that beside a pass's columns there is never more than what it sums up.
        seen = self._times_covariance(model, columns)
        columns = {p: torch.linalg.qr(seen.pop(p)).Q for p in ranks}
        seen = self._times_covariance(model, columns)
        for p in ranks:
            lefts = torch.linalg.qr(_times_weight(model, p, seen.pop(p))).Q
            columns[p] = _times_weight(model, p, lefts, transposed=True)
        seen = self._times_covariance(model, columns)
        return Statistics({p: ProjectionStatistics(sketch=seen[p]) for p in ranks})

    def _times_covariance(
        self, model: nn.Module, columns: Mapping[Projection, Tensor]
    ) -> dict[Projection, Tensor]:
        assert self.batches is not None
        measured = calibrate(
            model,
            list(columns),
            {"sketch"},
            self.batches,
            loss=self.loss,
            mask=self.mask,
            columns=columns,
            progress=self.progress,
        )
        return {p: each.sketch for p, each in measured.items() if each.sketch is not None}

    def fits(self, projections: Sequence[Projection], needs: frozenset[str]) -> bool:
        """Can all of it be held at once?"""
        return self.memory is None or predicted_bytes(projections, needs) <= self.memory

    def parts(
        self, model: nn.Module, projections: Sequence[Projection], needs: frozenset[str]
    ) -> Iterator[tuple[list[Projection], Statistics]]:
        """Some projections at a time with their statistics, which may be dropped before the next.

        Raises:
            ValueError: several passes are needed, and the batches can be read only once.
        """
        chunks = self._chunks(projections, needs)
        if len(chunks) > 1:
            self.check_rereadable(projections, needs)
        for chunk in chunks:
            yield chunk, self.measure(model, chunk, needs)

    def check_rereadable(self, projections: Sequence[Projection], needs: frozenset[str]) -> None:
        """Raises ValueError for batches that can be read once where that is not enough."""
        if self.batches is not None and iter(self.batches) is self.batches:
            why = "a sketch takes three passes"
            if self.memory is not None and needs:
                size = predicted_bytes(projections, needs)
                why = f"{size:,} bytes of statistics exceed memory={self.memory:,}, so they go in parts"
            raise ValueError(
                f"{why}, and the batches must be read several times: pass a list or a DataLoader, "
                "or allow more memory"
            )

    def _chunks(self, projections: Sequence[Projection], needs: frozenset[str]) -> list[list[Projection]]:
        """Runs of projections that fit the memory; one parent's stay together, since they share inputs."""
        if self.fits(projections, needs):
            return [list(projections)]
        families: dict[str, list[Projection]] = {}
        for p in projections:
            families.setdefault(f"{p.module.rpartition('.')[0]}:{p.in_features}", []).append(p)
        chunks: list[list[Projection]] = []
        for family in families.values():
            if chunks and self.fits(chunks[-1] + family, needs):
                chunks[-1] += family
            else:
                chunks.append(family)
        return chunks

    def _of_weights(self, model: nn.Module, projections: Sequence[Projection]) -> Statistics:
        bar = tqdm(projections, "singular values", disable=not self.progress, delay=2, leave=False)
        spectra = {p: ProjectionStatistics(spectrum=_singular_values(model, p)) for p in bar}
        return Statistics(spectra, of_projections(model, projections))


def _singular_values(model: nn.Module, p: Projection) -> Tensor:
    """(min(out, in),) fp64, descending; small ones as accurate as the square root of fp64's."""
    weight = p.weight(model)
    if not weight.isfinite().all():
        raise ValueError(f"{p.name}: NaN or Inf in its weight, which has no singular values then")
    tall = weight.double() if weight.shape[0] >= weight.shape[1] else weight.double().T
    return torch.linalg.eigvalsh(tall.T @ tall).clamp_min(0).sqrt().flip(0)


def _times_weight(model: nn.Module, p: Projection, columns: Tensor, *, transposed: bool = False) -> Tensor:
    """W·columns, or Wᵀ·columns, in fp32 or better."""
    weight = p.weight(model)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with full_precision(weight.device):
        return (weight.T if transposed else weight) @ columns.to(weight)
