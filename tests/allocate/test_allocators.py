"""Uniform and sensitive allocation, against the rules written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.allocate import Allocator, Sensitivity, Uniform
from lowrank.allocate.budget import Costs, reference_rank
from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.models.projections import Projection, Role

SHAPES = [(64, 64), (64, 64), (256, 64), (64, 256)]
PROJECTIONS = [Projection(f"m{i}", "weight", (0, o), Role.OTHER, n, o) for i, (o, n) in enumerate(SHAPES)]
COST = {p: sum(p.shape) for p in PROJECTIONS}


def measured(*sensitivities: float) -> dict[Projection, ProjectionStatistics]:
    return {p: ProjectionStatistics(sensitivity=s) for p, s in zip(PROJECTIONS, sensitivities, strict=True)}


def ranks(
    allocator: Allocator, *, statistics: object = None, budget: int | None = None, rank: int = 8
) -> list[int]:
    given_ = allocator(PROJECTIONS, rank=rank, budget=budget, alpha=16.0, cost=COST, statistics=statistics)
    return [given_[p].rank for p in PROJECTIONS]


def test_uniform() -> None:
    given_ = Uniform()(PROJECTIONS, rank=8, budget=None, alpha=16.0, cost=COST)
    assert {(a.rank, a.scaling) for a in given_.values()} == {(8, 2.0)}


def test_the_reference_rank_is_the_largest_equal_one_that_fits() -> None:
    one = sum(COST.values())
    assert reference_rank(PROJECTIONS, COST, 5 * one) == 5
    assert reference_rank(PROJECTIONS, COST, 6 * one - 1) == 5
    assert reference_rank(PROJECTIONS, COST, 10**9) == 64
    assert reference_rank(PROJECTIONS, COST, min(COST.values())) == 1
    narrow = Costs(COST, {**dict.fromkeys(PROJECTIONS, 64), PROJECTIONS[2]: 2})
    assert reference_rank(PROJECTIONS, narrow, 2 * one + 5 * (one - COST[PROJECTIONS[2]])) == 7
    assert ranks(Uniform(), budget=5 * one, rank=5) == [5] * 4


def test_uniform_leaves_a_projection_without_rows_alone() -> None:
    empty = Projection("empty", "weight", (0, 0), Role.OTHER, 64, 0)
    projections = [*PROJECTIONS, empty]
    cost = {**COST, empty: 64}
    given_ = Uniform()(projections, rank=4, budget=4 * sum(COST.values()), alpha=16.0, cost=cost)
    assert [given_[p].rank for p in projections] == [4, 4, 4, 4, 0]


def test_uniform_gives_no_projection_more_than_it_can_have() -> None:
    assert ranks(Uniform(), rank=65) == [64] * 4


def test_uniform_says_what_is_too_little() -> None:
    with pytest.raises(ValueError, match="too small for rank 1 in each of 4"):
        ranks(Uniform(), rank=1, budget=sum(COST.values()) - 1)


def test_the_authors_rule() -> None:
    """round(n·r·I/ΣI), the remainder to the largest (TLoRA's released code)."""
    sensitivities = [0.1, 0.2, 0.3, 0.41]
    plain = [round(4 * 8 * s / sum(sensitivities)) for s in sensitivities]
    plain[3] += 32 - sum(plain)
    assert ranks(Sensitivity(unit="ranks"), statistics=measured(*sensitivities)) == plain


@given(st.lists(st.floats(0, 1e3), min_size=4, max_size=4).filter(any), st.integers(1, 64))
def test_ranks_add_up_and_stay_within_the_shapes(sensitivities: list[float], rank: int) -> None:
    got = ranks(Sensitivity(unit="ranks"), statistics=measured(*sensitivities), rank=rank)
    room = sum(64 for s in sensitivities if s)
    assert sum(got) == min(4 * rank, room)
    assert all(0 <= r <= 64 for r in got)
    assert all(r == 0 for r, s in zip(got, sensitivities, strict=True) if not s)


def test_parameters_follow_sensitivity_and_spend_the_budget() -> None:
    """896 parameters a rank everywhere, 8 ranks: t · (128 + 2 · 128 + 320) = 7168, so t = 10.18."""
    got = ranks(Sensitivity(), statistics=measured(1.0, 2.0, 1.0, 0.0))
    assert got == [10, 21, 10, 0]  # the target 20.36 has the largest remainder
    assert 8 * sum(COST.values()) - sum(r * COST[p] for r, p in zip(got, PROJECTIONS, strict=True)) == 0


def test_a_floor() -> None:
    got = ranks(Sensitivity(floor=3), statistics=measured(1e-9, 1.0, 1.0, 0.0))
    assert got[0] == 3 and got[3] == 0


def test_scaling_is_the_effective_one_of_the_authors_code() -> None:
    sensitivities = [0.1, 0.2, 0.3, 0.4]
    given_ = Sensitivity()(
        PROJECTIONS, rank=8, budget=None, alpha=16.0, cost=COST, statistics=measured(*sensitivities)
    )
    assert [given_[p].scaling for p in PROJECTIONS] == pytest.approx([2.0, 2.0, 2.0 * 1.2, 2.0 * 1.6])


@pytest.mark.parametrize(
    ("allocator", "kwargs", "message"),
    [
        (Sensitivity(), {"statistics": None}, "pass batches="),
        (Sensitivity(), {"statistics": measured(0, 0, 0, 0)}, "all sensitivities are zero"),
        (Sensitivity(), {"statistics": measured(1, 1, float("nan"), 1)}, "m2 has no measured sensitivity"),
        (Sensitivity(), {"statistics": {}}, "m0 has no measured sensitivity"),
        (
            Sensitivity(),
            {"statistics": measured(1, 1, 1, 1), "budget": 100},
            "too small for one rank anywhere",
        ),
    ],
)
def test_what_cannot_be_allocated(allocator: Allocator, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(allocator, **kwargs)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match='unit: expected "parameters" or "ranks"'):
        Sensitivity(unit="bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floor: expected zero or more"):
        Sensitivity(floor=-1)


def test_allocators_are_values() -> None:
    assert Sensitivity() == Sensitivity() != Sensitivity(unit="ranks")
    assert repr(Sensitivity()) == "Sensitivity(unit='parameters', floor=0)"
    assert isinstance(Uniform(), Allocator) and isinstance(Sensitivity(), Allocator)
    assert len({Uniform(), Uniform(), Sensitivity()}) == 2
