"""Plans as JSON: one row for each projection, and the settings beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lowrank.allocate.base import Allocation
from lowrank.formats.strategies import Recorded, belongs, decode, encode, typed
from lowrank.linalg.rows import Rows
from lowrank.models.projections import Projection, Role
from lowrank.models.tokens import TokenRows

FORMAT, VERSION = "lowrank-plan", 1


def plan_to_json(plan: Any) -> dict[str, Any]:
    """Plain data of a `Plan`; projections that a pattern is for are numbers of rows."""
    place = {p: i for i, p in enumerate(plan)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "budget": plan.budget,
        "reference_rank": plan.reference_rank,
        "learning_rate": plan.learning_rate,
        "init": encode(plan.init),
        "dropout": plan.dropout,
        "train": list(plan.train),
        "seed": plan.seed,
        "dora": plan.dora,
        "notes": list(plan.notes),
        "left_out": plan.left_out,
        "matches": {spelled: [place[p] for p in hits] for spelled, hits in plan.matches.items()},
        **({"rows": [asdict(rows) for rows in plan.rows]} if plan.rows else {}),
        "projections": [
            {
                **asdict(p),
                **asdict(allocation),
                "cost": plan.costs[p],
                **({"energy": plan.energies[p]} if p in plan.energies else {}),
            }
            for p, allocation in plan.items()
        ],
    }


def plan_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Plan` that ``data`` says.

    Raises:
        ValueError: ``data`` is no plan, or one of another version.
    """
    try:
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(
                f"expected {FORMAT} version {VERSION}, got {data['format']} version {data['version']}"
            )
        allocations: dict[Projection, Allocation] = {}
        costs, energies = {}, {}
        for row in data["projections"]:
            p = _projection(row)
            if p in allocations:
                raise ValueError(f"{p.name} is listed twice")
            allocations[p] = Allocation(typed(row["rank"], int), _number(row["scaling"]))
            costs[p] = typed(row["cost"], int)
            if "energy" in row:
                energies[p] = _number(row["energy"])
        init = decode(data["init"])
        if not (init is None or isinstance(init, Recorded) or belongs(init, "lowrank.init.")):
            raise ValueError(f"{init!r:.80} is not an initializer")
        return {
            "allocations": allocations,
            "costs": costs,
            "budget": _whole(data["budget"]),
            "init": init,
            "dropout": _number(data["dropout"]),
            "train": [typed(name, str) for name in data["train"]],
            "seed": typed(data["seed"], int),
            "energies": energies,
            "notes": [typed(note, str) for note in data.get("notes", ())],
            "left_out": {name: typed(why, str) for name, why in data.get("left_out", {}).items()},
            "matches": _matches(data.get("matches", {}), list(allocations)),
            "reference_rank": _whole(data.get("reference_rank")),
            "learning_rate": None if (rate := data.get("learning_rate")) is None else _number(rate),
            "rows": [_token_rows(row) for row in data.get("rows", ())],
            "dora": _flag(data.get("dora", False)),
        }
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"this is not a plan: {type(error).__name__}: {error}") from error


def _projection(row: Mapping[str, Any]) -> Projection:
    return Projection(
        module=typed(row["module"], str),
        param=typed(row["param"], str),
        rows=_rows(row["rows"]),
        role=Role(row["role"]),
        in_features=typed(row["in_features"], int),
        out_features=typed(row["out_features"], int),
        block=typed(row["block"], str),
        shared=typed(row.get("shared", 1), int),
    )


def _matches(said: Mapping[str, Any], projections: Sequence[Projection]) -> dict[str, list[Projection]]:
    places = {typed(spelled, str): [typed(i, int) for i in hits] for spelled, hits in said.items()}
    if any(not 0 <= i < len(projections) for hits in places.values() for i in hits):
        raise ValueError(f"matches names a projection that is not there; there are {len(projections)}")
    return {spelled: [projections[i] for i in hits] for spelled, hits in places.items()}


def _token_rows(row: Mapping[str, Any]) -> TokenRows:
    ids = tuple(typed(i, int) for i in row["ids"])
    return TokenRows(typed(row["module"], str), ids, typed(row["width"], int))


def _rows(said: Any) -> Rows:
    rows = tuple(typed(number, int) for number in said)
    if len(rows) not in (2, 4):
        raise ValueError(f"rows are (start, stop) or (start, stop, size, stride), got {said!r:.80}")
    return rows


def _number(value: Any) -> float:
    return float(typed(value, (int, float)))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _whole(value: Any) -> int | None:
    return None if value is None else typed(value, int)
