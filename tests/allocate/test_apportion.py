"""Whole ranks under a budget: what must hold for any shares, costs and caps."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.allocate.apportion import apportion

ENTRY = st.tuples(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),  # share
    st.integers(1, 5000),  # cost
    st.integers(0, 64),  # cap
    st.integers(0, 3),  # floor
)
ENTRIES = st.lists(ENTRY, min_size=1, max_size=40).filter(lambda entries: any(share for share, *_ in entries))
BUDGET = st.integers(0, 2_000_000)
ROUNDING = Fraction(1, 10**6)  # of a rank


def targets(entries: list[tuple], budget: int) -> list[Fraction]:
    """``clip(t · share)`` with the largest t that the budget pays for, exactly."""
    lows = [min(low, cap) if share else 0 for share, _, cap, low in entries]
    shares = [Fraction(share) for share, *_ in entries]

    def at(t: Fraction) -> list[Fraction]:
        rows = zip(lows, entries, shares, strict=True)
        return [max(Fraction(low), min(Fraction(entry[2]), t * share)) for low, entry, share in rows]

    def price(t: Fraction) -> Fraction:
        return sum((rank * entry[1] for rank, entry in zip(at(t), entries, strict=True)), Fraction(0))

    bends = [
        Fraction(bound) / share
        for (_, _, cap, _), low, share in zip(entries, lows, shares, strict=True)
        if share
        for bound in (low, cap)
    ]
    below = max((t for t in [Fraction(0), *bends] if price(t) <= budget), default=Fraction(0))
    above = min((t for t in bends if t > below), default=None)
    if above is None:
        return at(below)
    slope = (price(above) - price(below)) / (above - below)  # not 0, or `above` would be paid for too
    return at(below + (budget - price(below)) / slope)


@given(ENTRIES, BUDGET)
def test_ranks_are_proportional_to_within_one_and_the_rest_pays_for_no_further_one(
    entries: list[tuple], budget: int
) -> None:
    shares, costs, caps, floors = map(list, zip(*entries, strict=True))
    lows = [min(low, cap) if share else 0 for share, _, cap, low in entries]
    if sum(low * cost for low, cost in zip(lows, costs, strict=True)) > budget:
        with pytest.raises(ValueError, match="floors alone cost"):
            apportion(shares, costs, caps, budget, floors)
        return
    ranks = apportion(shares, costs, caps, budget, floors)
    wanted = targets(entries, budget)
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert left >= 0
    for rank, target, low, (share, cost, cap, _) in zip(ranks, wanted, lows, entries, strict=True):
        assert low <= rank <= cap
        assert share or rank == 0
        assert abs(rank - target) < 1 + ROUNDING
        assert cost > left or rank > target - ROUNDING


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20),
    st.integers(1, 500),
    st.integers(1, 64),
    st.integers(0, 200_000),
)
def test_at_equal_cost_a_larger_share_never_gets_the_smaller_rank(
    shares: list[float], cost: int, cap: int, budget: int
) -> None:
    n = len(shares)
    ranks = apportion([*shares, 1.0], [cost] * n + [7], [cap] * n + [9], budget)[:n]
    for i in range(n):
        for j in range(n):
            assert shares[i] <= shares[j] or ranks[i] >= ranks[j]


@given(ENTRIES, BUDGET)
def test_a_larger_budget_raises_every_target(entries: list[tuple], budget: int) -> None:
    shares, costs, caps, _ = map(list, zip(*entries, strict=True))
    less, more = apportion(shares, costs, caps, budget), apportion(shares, costs, caps, 2 * budget)
    assert all(b >= a - 1 for a, b in zip(less, more, strict=True))


@given(ENTRIES, BUDGET)
def test_only_proportions_matter(entries: list[tuple], budget: int) -> None:
    shares, costs, caps, _ = map(list, zip(*entries, strict=True))
    once = apportion(shares, costs, caps, budget)
    assert once == apportion([s * 2.0 for s in shares], costs, caps, budget)


def test_equal_costs_give_ranks_in_proportion() -> None:
    assert apportion([1, 2, 5], [10, 10, 10], [99, 99, 99], 80) == [1, 2, 5]


def test_ties_go_to_the_first() -> None:
    assert apportion([1, 1, 1], [10, 10, 10], [9, 9, 9], 40) == [2, 1, 1]


def test_the_largest_remainder_comes_first() -> None:
    """Targets 1.2, 2.4 and 2.4 of a budget of 6: the last two have the remainder .4, and one rank is left."""
    assert apportion([1, 2, 2], [1, 1, 1], [9, 9, 9], 6) == [1, 3, 2]


def test_what_a_cap_refuses_goes_to_the_others() -> None:
    assert apportion([100, 1, 1], [1, 1, 1], [4, 50, 50], 24) == [4, 10, 10]


@pytest.mark.parametrize(
    ("budget", "ranks"), [(8080, [8, 8]), (9070, [9, 8]), (9089, [9, 8]), (9090, [9, 9])]
)
def test_the_remainder_is_not_spent_on_the_cheapest(budget: int, ranks: list[int]) -> None:
    assert apportion([1, 1], [10, 1000], [64, 64], budget) == ranks


@pytest.mark.parametrize("shares", [[0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_bad_shares(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="shares: expected finite numbers"):
        apportion(shares, [1, 1], [1, 1], 10)
