"""Whole ranks under a budget: what must hold for any shares, costs and caps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.allocate.apportion import apportion

ENTRY = st.tuples(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),  # share
    st.integers(1, 5000),  # cost
    st.integers(1, 64),  # cap
    st.integers(0, 3),  # floor
)
ENTRIES = st.lists(ENTRY, min_size=1, max_size=40).filter(lambda entries: any(share for share, *_ in entries))


@given(ENTRIES, st.integers(0, 2_000_000))
def test_a_budget_is_spent_to_within_one_rank(entries: list[tuple], budget: int) -> None:
    shares, costs, caps, _ = map(list, zip(*entries, strict=True))
    ranks = apportion(shares, costs, caps, budget)
    spent = sum(r * c for r, c in zip(ranks, costs, strict=True))
    assert spent <= budget
    assert all(0 <= r <= cap for r, cap in zip(ranks, caps, strict=True))
    assert all(r == 0 for r, share in zip(ranks, shares, strict=True) if not share)
    growable = [c for r, c, cap, s in zip(ranks, costs, caps, shares, strict=True) if s and r < cap]
    assert not growable or budget - spent < min(growable)


@given(ENTRIES, st.integers(0, 2_000_000))
def test_floors_hold_where_there_is_a_share(entries: list[tuple], budget: int) -> None:
    shares, costs, caps, floors = map(list, zip(*entries, strict=True))
    lows = [min(f, cap) if s else 0 for f, cap, s in zip(floors, caps, shares, strict=True)]
    if sum(low * c for low, c in zip(lows, costs, strict=True)) > budget:
        with pytest.raises(ValueError, match="floors alone cost"):
            apportion(shares, costs, caps, budget, floors)
        return
    ranks = apportion(shares, costs, caps, budget, floors)
    assert all(r >= low for r, low in zip(ranks, lows, strict=True))
    assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget


@given(ENTRIES, st.integers(0, 2_000_000), st.floats(1e-3, 1e3))
def test_only_proportions_matter_and_ties_are_deterministic(
    entries: list[tuple], budget: int, unit: float
) -> None:
    shares, costs, caps, _ = map(list, zip(*entries, strict=True))
    once = apportion(shares, costs, caps, budget)
    assert once == apportion(shares, costs, caps, budget)
    doubled = apportion([s * 2.0 for s in shares], costs, caps, budget)
    assert once == doubled


def test_equal_costs_give_ranks_in_proportion() -> None:
    assert apportion([1, 2, 5], [10, 10, 10], [99, 99, 99], 80) == [1, 2, 5]


def test_ties_go_to_the_first() -> None:
    assert apportion([1, 1, 1], [10, 10, 10], [9, 9, 9], 40) == [2, 1, 1]


def test_what_a_cap_refuses_goes_to_the_others() -> None:
    assert apportion([100, 1, 1], [1, 1, 1], [4, 50, 50], 24) == [4, 10, 10]


def test_dear_ranks_are_bought_less_often_only_where_the_budget_ends() -> None:
    ranks = apportion([1, 1], [10, 1000], [64, 64], 8080)
    assert ranks == [8, 8]


@pytest.mark.parametrize("shares", [[0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_bad_shares(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="shares must be finite"):
        apportion(shares, [1, 1], [1, 1], 10)
