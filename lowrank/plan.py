"""A plan: how much rank each projection gets, and what wrapping needs beside that.

It is data. It can be printed, saved, compared, and carried to another tool; it touches no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any

from lowrank.allocate.base import Allocation
from lowrank.files import write
from lowrank.formats.layers import ranks_by_layer
from lowrank.formats.patterns import peft_patterns
from lowrank.formats.plan_table import plan_cells, plan_remarks, plan_total
from lowrank.formats.plans import plan_arguments, plan_to_json
from lowrank.formats.table import table
from lowrank.models.projections import Projection
from lowrank.models.tokens import TokenRows
from lowrank.plots import by_layer


class Plan(Mapping[Projection, Allocation]):
    """Projection → `Allocation`, with the choices that turn it into adapters.

    Args:
        allocations: what each projection gets; rank 0 leaves it alone.
        costs: trainable parameters of one rank; ``in + out`` where it is not said.
        budget: trainable adapter parameters that could be spent: the policy's budget, or what its rank costs
            everywhere. None where it is not known, or where the ranks were not limited by it.
        init: the initializer, or None: `wrap_model` then starts as plain LoRA does.
        dropout: on the adapters' inputs.
        train: paths of the modules that are trained in full.
        seed: of every random draw.
        energies: share of the squared singular values that the start holds, where it is known.
        notes: what a reader should know and the rows do not show: what was left out or limited, and why.
        left_out: what "all-linear" does not adapt, modules and weights by name, each with why; the notes
            say the same in short.
        matches: the policy's patterns in the user's spelling, such as ``target='vision:all-linear'`` and
            ``ranks['q_proj']=32``, each with the projections that it is for.
        dora: the magnitude of each output row is trained too (2402.09353).
        reference_rank: the rank that the scalings refer to: what the uniform allocation of the budget gives.
            None where it is not known, as in a plan made by hand.
        learning_rate: a peak rate to train with; None where it was not measured, by `plan_learning_rate`.
        rows: of embeddings: where there are some, only these rows of the embedding train.

    Raises:
        ValueError: a rank below 0 or above ``min(in, out)``, no rank anywhere, or a scaling or dropout out of
            range.
    """

    def __init__(
        self,
        allocations: Mapping[Projection, Allocation],
        *,
        costs: Mapping[Projection, int] | None = None,
        budget: int | None = None,
        init: Any = None,
        dropout: float = 0.0,
        train: Sequence[str] = (),
        seed: int = 0,
        energies: Mapping[Projection, float] | None = None,
        notes: Sequence[str] = (),
        left_out: Mapping[str, str] | None = None,
        matches: Mapping[str, Sequence[Projection]] | None = None,
        reference_rank: int | None = None,
        dora: bool = False,
        learning_rate: float | None = None,
        rows: Sequence[TokenRows] = (),
    ) -> None:
        for projection, allocation in allocations.items():
            most = min(projection.shape)
            if not 0 <= allocation.rank <= most:
                raise ValueError(
                    f"{projection.name}: expected a rank from 0 to {most}, got {allocation.rank}"
                )
            if not isfinite(allocation.scaling):
                raise ValueError(f"{projection.name}: expected a finite scaling, got {allocation.scaling}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number from 0 to below 1, got {dropout}")
        if reference_rank is not None and reference_rank < 1:
            raise ValueError(f"reference_rank: expected at least 1, got {reference_rank}")
        if learning_rate is not None and not 0 < learning_rate < inf:
            raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
        if not any(allocation.rank for allocation in allocations.values()):
            raise ValueError("the plan gives no projection any rank")
        self._allocations = dict(allocations)
        self.costs = {p: (costs or {}).get(p, sum(p.shape)) for p in self._allocations}
        self.budget = budget
        self.init = init
        self.dropout = dropout
        self.train = tuple(train)
        self.seed = seed
        self.energies = dict(energies or {})
        self.notes = tuple(notes)
        self.left_out = dict(left_out or {})
        self.matches = {spelled: tuple(hits) for spelled, hits in (matches or {}).items()}
        self.reference_rank = reference_rank
        self.dora = dora
        self.learning_rate = learning_rate
        self.rows = tuple(rows)

    def __getitem__(self, projection: Projection) -> Allocation:
        return self._allocations[projection]

    def __iter__(self) -> Iterator[Projection]:
        return iter(self._allocations)

    def __len__(self) -> int:
        return len(self._allocations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._state() == other._state()

    __hash__ = None  # type: ignore[assignment]

    def _state(self) -> tuple[Any, ...]:
        settings = (
            self.budget,
            self.reference_rank,
            self.init,
            self.dropout,
            self.train,
            self.seed,
            self.dora,
            self.rows,
        )
        return self._allocations, self.costs, settings

    @property
    def adapted(self) -> list[Projection]:
        """The projections that get rank."""
        return [p for p, allocation in self.items() if allocation.rank]

    @property
    def trainable_parameters(self) -> int:
        """Trainable adapter parameters: frozen factors and modules trained in full do not count."""
        return sum(map(self.parameters, self)) + sum(rows.parameters for rows in self.rows)

    def parameters(self, projection: Projection) -> int:
        """Trainable adapter parameters of one projection."""
        rank = self[projection].rank
        return rank * self.costs[projection] + (projection.out_features if self.dora and rank else 0)

    def __repr__(self) -> str:
        adapted = f"{len(self.adapted)} of {len(self)} projections"
        return f"<Plan: {adapted}, {self.trainable_parameters:,} parameters>"

    def __str__(self) -> str:
        """A table: projection, role, shape, rank, scaling, parameters, share of the budget, energy."""
        lines = [*table(plan_cells(self), left=2), *plan_remarks(self)]
        return "\n".join(line.rstrip() for line in lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """A heat map of the ranks, layer × role; where a cell has several projections, their ranks add up.

        The layer is the first number in a module's path; modules without one are a column of their own, "–".
        Needs matplotlib. It is written to ``path``, whose ending says the format, where there is one, and
        the figure is returned.
        """
        return by_layer(ranks_by_layer(self), path, title=plan_total(self))

    # -- JSON ---------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` makes an equal plan of it."""
        return plan_to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises ValueError where ``data`` is no plan, or one of another version."""
        return cls(**plan_arguments(data))

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        write(Path(path), json.dumps(self.to_json(), indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote; raises ValueError where it is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.from_json(data)

    # -- PEFT ---------------------------------------------------------------------------------------

    def to_peft(self) -> dict[str, Any]:
        """Keyword arguments for ``peft.LoraConfig``: this allocation, started and trained as PEFT does.

        PEFT adapts a fused weight whole: its blocks' ranks add up, and their scalings are averaged by
        rank. Every value is spelled per module, by its full path.

        Raises:
            ValueError: a projection lies in a tensor that no Linear holds.
        """
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for p in self.adapted:
            if p.param != "weight":
                raise ValueError(f"{p.name}: PEFT's LoraConfig cannot name a tensor that no Linear holds")
            rank, scaling = self[p].rank, self[p].scaling
            ranks[p.module] = ranks.get(p.module, 0) + rank
            alphas[p.module] = alphas.get(p.module, 0.0) + rank * scaling
        more: dict[str, Any] = {"use_dora": True} if self.dora else {}
        if self.rows:
            more["trainable_token_indices"] = {rows.module: list(rows.ids) for rows in self.rows}
        return {"target_modules": sorted(ranks), **peft_patterns(ranks, alphas), **more}
