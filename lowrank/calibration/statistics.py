"""What calibration measures, as data: no hooks, no model. `calibrate` fills it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.files import replacing
from lowrank.models.fingerprint import Sample, differences, of_projections
from lowrank.models.projections import Projection, Role

FORMAT, VERSION = "lowrank-statistics", "2"

KINDS = frozenset({"covariance", "moment", "sensitivity", "gradient"})
"""What can be measured on batches."""

OF_WEIGHTS = frozenset({"spectrum"})
"""What can be measured on the weights alone."""


@dataclass(frozen=True, eq=False)
class ProjectionStatistics:
    """What one projection showed on the calibration batches; what was not asked for is None.

    covariance: (in, in), fp32 or better; mean over examples of the input tokens' scatter, each
        example centred by itself (TLoRA, section 3). Projections that read the same input share it.
    token_covariance: (in, in), fp32 or better; mean over all input tokens of their scatter around ``mean``
        (EVA, 2410.07170). Shared as the covariance is.
    mean: (in,), fp64, of all input tokens. These two are what is measured as "moment".
    sensitivity: mean over examples of mean |W ⊙ ∇W| (TLoRA, section 3).
    gradient: (out, in), fp32 or better; mean over examples of ∇W.
    spectrum: (min(out, in),), fp64, descending: the singular values of the weight; needs no batches.
    """

    covariance: Tensor | None = None
    token_covariance: Tensor | None = None
    mean: Tensor | None = None
    sensitivity: float | None = None
    gradient: Tensor | None = None
    spectrum: Tensor | None = None

    @property
    def moment(self) -> Tensor | None:
        """(in, in), fp64: mean of x·xᵀ over all input tokens, not centred (CorDA, 2406.05223).

        Made anew each time. It is in fp64 since a large mean would take the digits of what varies.
        """
        if self.token_covariance is None or self.mean is None:
            return None
        mean = self.mean.to(self.token_covariance.device, torch.float64)
        return self.token_covariance.double().addr(mean, mean)


TENSORS = tuple(field.name for field in fields(ProjectionStatistics) if field.name != "sensitivity")


class Statistics(Mapping[Projection, ProjectionStatistics]):
    """Projection → `ProjectionStatistics`. Measured once, it serves any policy that needs no more.

    Args:
        measured: what each projection showed.
        fingerprint: samples of the weights that it was measured on, so that statistics of another model are
            noticed. Without one they are taken as they are: ``Statistics(statistics)`` drops it.
    """

    def __init__(
        self,
        measured: Mapping[Projection, ProjectionStatistics],
        fingerprint: Mapping[Projection, Sample] | None = None,
    ) -> None:
        self._measured = dict(measured)
        self.fingerprint = dict(fingerprint or {})

    def __getitem__(self, projection: Projection) -> ProjectionStatistics:
        return self._measured[projection]

    def __iter__(self) -> Iterator[Projection]:
        return iter(self._measured)

    def __len__(self) -> int:
        return len(self._measured)

    def __repr__(self) -> str:
        held = {name for each in self.values() for name in vars(each) if getattr(each, name) is not None}
        return f"<Statistics of {len(self)} projections: {', '.join(sorted(held))}>"

    def lacks(self, projections: Iterable[Projection], need: str) -> bool:
        """Is ``need`` unmeasured for any of ``projections``?"""
        return any(p not in self or getattr(self[p], need) is None for p in projections)

    def check(self, model: nn.Module, projections: Iterable[Projection]) -> None:
        """Raises ValueError where the weights of ``projections`` are not those that this was measured on."""
        held = [p for p in projections if p in self.fingerprint]
        found = differences(of_projections(model, held), self.fingerprint)
        if found:
            raise ValueError(
                "the statistics were measured on another model (if that is meant: "
                "statistics=Statistics(statistics) forgets which):\n  "
                + "\n  ".join(f"{p.name}: {text}" for p, text in found.items())
            )

    def merged(self, other: Statistics) -> Statistics:
        """What either holds, fingerprints too; where both do, what ``other`` holds."""
        both = dict(self)
        for p, each in other.items():
            new = {name: value for name, value in vars(each).items() if value is not None}
            both[p] = replace(both.get(p, ProjectionStatistics()), **new)
        return Statistics(both, {**self.fingerprint, **other.fingerprint})

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file; a covariance that several projections share is written once."""
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        rows = []
        for p, each in self.items():
            row: dict[str, Any] = {"projection": asdict(p), "sensitivity": each.sensitivity}
            if p in self.fingerprint:
                row["fingerprint"] = self.fingerprint[p].to_json()
            for kind in TENSORS:
                tensor = getattr(each, kind)
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{kind}.{len(names)}")
                    tensors[name] = tensor.detach().cpu().contiguous()
                    row[kind] = name
            rows.append(row)
        metadata = {"format": FORMAT, "version": VERSION, "rows": json.dumps(rows)}
        with replacing(Path(path)) as file:
            save_file(tensors or {"none": torch.zeros(0)}, file, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Reads what `save` wrote; raises ValueError where it is something else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                    raise ValueError(f"{path} does not hold {FORMAT} of version {VERSION}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            measured, fingerprint = {}, {}
            for row in json.loads(metadata["rows"]):
                said = row["projection"]
                p = Projection(**{**said, "rows": tuple(said["rows"]), "role": Role(said["role"])})
                held = {kind: tensors[row[kind]] for kind in TENSORS if kind in row}
                measured[p] = ProjectionStatistics(sensitivity=row["sensitivity"], **held)
                if "fingerprint" in row:
                    fingerprint[p] = Sample.from_json(row["fingerprint"])
            return cls(measured, fingerprint)
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} does not hold whole statistics: {error}") from error
