"""Whole ranks under a budget of parameters: the arithmetic, free of models and policies."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite

NOTHING = 1e-9  # of a rank: what rounding in t may add to a whole target or take from it


def apportion(
    shares: Sequence[float],
    costs: Sequence[int],
    caps: Sequence[int],
    budget: int,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Whole ranks in proportion to ``shares``, whose cost is within ``budget``.

    The target of an entry is ``t · share``, but at least its floor and at most its cap, with the largest t
    whose targets cost no more than the budget. An entry gets its target rounded down; then the entries with
    the largest remainders get one rank more each, where what is left pays for it (ties to the larger share,
    then to the first). An entry without a share gets nothing.

    So each rank differs from its target by less than one, and at equal cost, cap and floor the larger share
    never gets the smaller rank. What is left is less than the cost of one more rank of any entry that was
    rounded down. It is not spent on more ranks of the cheap entries, which would break the proportions.

    Raises:
        ValueError: a share is negative or not finite, all are zero, or the floors cost more than the budget.
    """
    floors = floors or [0] * len(shares)
    if not all(isfinite(share) and share >= 0 for share in shares) or not any(shares):
        raise ValueError(
            f"shares: expected finite numbers, none negative and not all zero, got {list(shares)}"
        )
    largest = max(shares)
    shares = [share / largest for share in shares]
    lows = [min(low, cap) if share else 0 for low, cap, share in zip(floors, caps, shares, strict=True)]

    def targets(t: float) -> list[float]:
        return [max(low, min(cap, t * share)) for low, cap, share in zip(lows, caps, shares, strict=True)]

    def total(ranks: Sequence[float]) -> float:
        return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))

    if total(lows) > budget:
        raise ValueError(
            f"the floors alone cost {total(lows):,} parameters, more than the budget of {budget:,}"
        )

    low, high = 0.0, 1.0
    while total(targets(high)) < budget and high < 1e300:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(targets(middle)) <= budget else (low, middle)
    wanted = targets(low)
    ranks = [floor(target + NOTHING) for target in wanted]
    entries = sorted(range(len(shares)), key=lambda i: (ranks[i] - wanted[i], -shares[i], i))
    left = budget - int(total(ranks))
    for i in reversed(entries):  # where NOTHING made a whole rank of a target just below it, and too many did
        if left < 0 and ranks[i] > wanted[i]:
            ranks[i] -= 1
            left += costs[i]
    for i in entries:
        if wanted[i] - ranks[i] > NOTHING and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks
