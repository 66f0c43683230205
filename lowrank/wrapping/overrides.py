"""What a policy says of single layers and projections: `layers`, `ranks`, `alphas` and `expert_rank`.

And which of its patterns is for which projections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from lowrank.allocate.base import Allocation
from lowrank.allocate.budget import Costs
from lowrank.models.experts import active_experts, within_experts
from lowrank.models.named import named_by
from lowrank.models.projections import Projection, telling
from lowrank.policy import Policy


def layer_number(p: Projection) -> int | None:
    """The index of the repeated block that holds ``p``: the first number in its path; None without one."""
    return next((int(part) for part in p.module.split(".") if part.isdigit()), None)


def in_layers(projections: Sequence[Projection], policy: Policy) -> tuple[list[Projection], list[str]]:
    """The projections in the layers that the policy names, and a note on the others.

    Raises:
        ValueError: a number that no targeted layer has.
    """
    if policy.layers is None:
        return list(projections), []
    numbers = {p: layer_number(p) for p in projections}
    there = sorted({number for number in numbers.values() if number is not None})
    if isinstance(policy.layers, str):
        first, _, last = policy.layers.partition(":")
        start, stop = int(first or 0), int(last) if last else max(there, default=0) + 1
        wanted, absent = {n for n in there if start <= n < stop}, []
    else:
        wanted = set(cast("Sequence[int]", policy.layers))
        absent = sorted(wanted - set(there))
    if absent or not wanted:
        known = f"{there[0]} to {there[-1]}" if there else "none: no path holds a number"
        said = f"; there is no layer {' or '.join(map(str, absent))}" if absent else ""
        raise ValueError(f"layers={policy.layers!r} names layers without a target{said}; they are {known}")
    kept = [p for p, number in numbers.items() if number in wanted]
    left = len(projections) - len(kept)
    return kept, [f"{left} projections: left out, outside of layers={policy.layers!r}"] if left else []


def divisors(model: nn.Module, projections: Sequence[Projection], policy: Policy) -> dict[Projection, int]:
    """What the rank of each projection of an expert is divided by: the number of active experts.

    Empty unless the policy asks for it. Raises ValueError where the model does not say how many there are.
    """
    if policy.expert_rank != "rank/active":
        return {}
    return {
        p: active_experts(model, p.module) for p in projections if within_experts(model, p.module, p.param)
    }


def divided(active: Mapping[Projection, int]) -> list[str]:
    """A note on what `divisors` says."""
    counts = Counter(active.values())
    return [
        f"{count} projections of experts: the rank is divided by {n} active experts"
        for n, count in counts.items()
    ]


def overridden(
    allocations: Mapping[Projection, Allocation],
    policy: Policy,
    cost: Costs,
    reference: int,
    active: Mapping[Projection, int],
) -> dict[Projection, Allocation]:
    """``allocations`` with the ranks and alphas that the policy says by name, and divided ranks of experts.

    The scaling of such a projection is that of its own alpha and its own rank, as with PEFT's patterns.

    Raises:
        ValueError: a pattern that matches no projection, or a rank that one cannot have.
    """
    targeted = list(allocations)
    ranks = {p: policy.ranks[pattern] for p, pattern in winning(policy.ranks, targeted, "ranks").items()}
    alphas = {p: policy.alphas[pattern] for p, pattern in winning(policy.alphas, targeted, "alphas").items()}
    made = dict(allocations)
    own_reference = {p: max(1, reference // n) for p, n in active.items()}
    for p, n in active.items():
        rank = max(1, made[p].rank // n) if made[p].rank else 0
        factor = policy.reference_scaling(own_reference[p]) / policy.reference_scaling(reference)
        made[p] = Allocation(rank, made[p].scaling * factor)
    for p in {**ranks, **alphas}:
        rank = ranks.get(p, made[p].rank)
        if rank > cost.largest[p]:
            raise ValueError(
                f"ranks: expected at most {cost.largest[p]} for {p.name} of shape {p.shape}, got {rank}"
            )
        own = replace(policy, alpha=alphas.get(p, policy.alpha), ranks={}, alphas={})
        made[p] = Allocation(rank, own.reference_scaling(ranks.get(p, own_reference.get(p, reference))))
    return made


def winning(said: Iterable[str], projections: Sequence[Projection], what: str) -> dict[Projection, str]:
    """The pattern of ``said`` that counts for each projection: of several that match it the longest.

    Raises ValueError where one matches none.
    """
    found: dict[Projection, str] = {}
    named, of_role = named_by(projections), dict[str, list[Projection]]()
    for p in projections:
        of_role.setdefault(p.role.value, []).append(p)
    for pattern in sorted(said, key=len):
        hits = [*of_role.get(pattern, ()), *named(pattern)]
        if not hits:
            ends = list(dict.fromkeys(p.module.rpartition(".")[2] for p in projections))
            raise ValueError(
                f"{what}={pattern!r} matches no targeted projection; they are {', '.join(ends[:8])}"
            )
        found |= dict.fromkeys(hits, pattern)
    return found


def matched(
    policy: Policy, meant: Mapping[str, Sequence[Projection]], projections: Sequence[Projection]
) -> dict[str, list[Projection]]:
    """Which of ``projections`` each pattern of the policy is for, in the user's spelling.

    Args:
        meant: what each name in the target means.
    """
    found = {}
    place = {p: i for i, p in enumerate(projections)}
    shared: dict[tuple[str, str, str], list[Projection]] = {}
    for p in projections:
        if p.shared > 1:
            shared.setdefault((p.module, p.param, p.role), []).append(p)
    for name, hits in meant.items():
        instead = (each for p in hits for each in shared.get((p.module, p.param, p.role), ()))
        found[f"target={name!r}"] = sorted(place.keys() & {*hits, *instead}, key=place.__getitem__)
    for what, said in (("ranks", policy.ranks), ("alphas", policy.alphas)):
        counts = winning(said, projections, what)
        won: dict[str, list[Projection]] = {pattern: [] for pattern in said}
        for p in projections:
            if p in counts:
                won[counts[p]].append(p)
        found |= {f"{what}[{pattern!r}]={value}": won[pattern] for pattern, value in said.items()}
    for pattern, role in policy.roles.items():
        told = [p for p in projections if telling(p, policy.roles) == pattern]
        found[f"roles[{pattern!r}]={role}"] = told
    return found
