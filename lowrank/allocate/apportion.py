"""Whole ranks under a budget of parameters: the arithmetic, free of models and policies."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite


def apportion(
    shares: Sequence[float],
    costs: Sequence[int],
    caps: Sequence[int],
    budget: int,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Ranks in proportion to ``shares``, whose cost comes as near to ``budget`` as whole ranks can.

    Between its floor and its cap each rank is ``t · share``, with the one t that spends the budget;
    it is rounded down, and what is left goes out by largest remainder (ties to the first). At the end
    what is left is less than one more rank of the cheapest entry that can still grow: one whose share
    is not zero and whose cap is not reached.

    Raises:
        ValueError: a share is negative or not finite, all are zero, or the floors exceed the budget.
    """
    floors = floors or [0] * len(shares)
    if not all(isfinite(share) and share >= 0 for share in shares) or not any(shares):
        raise ValueError(f"shares must be finite, not negative, and not all zero: {list(shares)}")
    largest = max(shares)
    shares = [share / largest for share in shares]
    lows = [min(low, cap) if share else 0 for low, cap, share in zip(floors, caps, shares, strict=True)]
    entries = range(len(shares))

    def targets(t: float) -> list[float]:
        return [max(low, min(cap, t * share)) for low, cap, share in zip(lows, caps, shares, strict=True)]

    def total(ranks: Sequence[float]) -> float:
        return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))

    if total(lows) > budget:
        raise ValueError(f"the floors alone cost {total(lows)} parameters, more than the budget of {budget}")

    low, high = 0.0, 1.0
    while total(targets(high)) < budget and high < 1e300:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(targets(middle)) <= budget else (low, middle)
    wanted = targets(low)
    ranks = [max(lows[i], floor(wanted[i] + 1e-9)) for i in entries]
    while total(ranks) > budget:  # the 1e-9 above may round one rank too many
        over = max((i for i in entries if ranks[i] > lows[i]), key=lambda i: ranks[i] - wanted[i])
        ranks[over] -= 1

    left = budget - int(total(ranks))
    while True:
        growing = [i for i in entries if shares[i] and ranks[i] < caps[i] and costs[i] <= left]
        if not growing:
            return ranks
        for i in sorted(growing, key=lambda i: (ranks[i] - wanted[i], i)):
            if costs[i] <= left:
                ranks[i] += 1
                left -= costs[i]
