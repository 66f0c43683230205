"""Which projections a policy means: targets, exclusions, and the error where a name means nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lowrank.models.beside import further, unheld
from lowrank.models.fused import Doubt, Fused
from lowrank.models.heads import output_heads
from lowrank.models.listing import as_names, large_weights, listed, nearest, under
from lowrank.models.named import named_by
from lowrank.models.patterns import matches
from lowrank.models.projections import Projection, Role, Roles, scan, telling
from lowrank.models.towers import within
from lowrank.models.trained import trained_modules

ROLE_UNKNOWN = "left out, since its role is not known: give it with roles={pattern: role}"
_ROLES = frozenset(role.value for role in Role)

Target = str | Sequence[str] | Callable[[Projection], bool]


class Selection(NamedTuple):
    """The projections that a policy means, and what its plan should say of those that it leaves out."""

    projections: list[Projection]
    notes: list[str]
    left_out: dict[str, str]  # of "all-linear": modules and weights that it does not adapt, each with why
    meant: dict[str, list[Projection]]  # what each name in the target means, as it is spelled


def select(
    model: nn.Module,
    target: Target,
    exclude: Sequence[str] = (),
    train: Sequence[str] = (),
    fused: Fused | None = None,
    roles: Roles | None = None,
) -> Selection:
    """The projections of ``model`` that ``target`` means, in the model's order.

    "all-linear" leaves out output heads, routers and layers that cannot be adapted, and takes a fused weight
    that cannot be divided as a whole; the notes say so.

    Raises:
        ValueError: nothing is asked for, a name matches nothing (with the nearest names), a layer that is
            named cannot be adapted, or a role may lie in a weight that cannot be divided.
    """
    fused = fused or {}
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in fused:
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(f"fused={pattern!r} names no module{nearest(pattern, paths)}")
    doubts = scan(model, fused, roles)
    for pattern in roles or {}:
        if not any(telling(p, [pattern]) for p in doubts):
            near = nearest(pattern, [p.name for p in doubts] or paths)
            raise ValueError(f"roles={pattern!r} names no projection of one role{near}")
    besides = further(model)
    if not doubts and not besides:
        raise ValueError(
            f"{type(model).__name__} has no linear layer, embedding or convolution, so nothing to adapt"
        )
    excludes = as_names(exclude, "exclude")
    trained = trained_modules(model, train)
    inside_trained = under(trained)
    held_by_none = [name for name, path in unheld(model, doubts).items() if not inside_trained(path)]
    doubts = {p: doubt for p, doubt in doubts.items() if not inside_trained(p.module)}
    besides = {p: doubt for p, doubt in besides.items() if not inside_trained(p.module)}
    known = _Known(
        model,
        doubts,
        output_heads(model),
        held_by_none,
        [path for path in paths if inside_trained(path)],
        besides,
        named_by(doubts),
        named_by(besides),
    )

    excluded = {p for name in excludes for p in known.named(name, excluding=True)}
    meant: dict[str, set[Projection]] = {}
    if callable(target):
        chosen = {p for p in doubts if target(p)}
        if not chosen:
            raise ValueError(f"the target {target!r} accepts none of the model's {len(doubts)} projections")
    else:
        names = as_names(target, "target")
        if not names:
            raise ValueError('no target: name projections, a role such as "query", or "all-linear"')
        by_role = [name for name in names if _is_role(name)]
        meant = {name: known.named(name) for name in names if name not in by_role}
        chosen = set().union(*meant.values())
        among = doubts.keys() - chosen - excluded
        for name in by_role:
            known.check_role(f"target={name!r}", name, among)
            meant[name] = known.named(name)
            chosen |= meant[name]
        meant = {name: meant[name] for name in names}
    chosen -= excluded
    for name in excludes:
        known.check_role(f"exclude={name!r}", name, chosen)
    aside = under([name for name in (*paths, *held_by_none) if any(matches(name, each) for each in excludes)])
    left_out = {
        name: why for name, why in known.left_out(target, chosen, excluded).items() if not aside(name)
    }
    notes = known.notes(target, chosen, excluded, left_out)
    if not chosen:
        raise ValueError(_nothing_left(target, excludes, train, notes))
    doubts |= besides
    broken = [doubt.reason for p in chosen if (doubt := doubts[p]) and not doubt.adaptable]
    if broken:
        more = f" (and {len(broken) - 1} more like it)" if len(broken) > 1 else ""
        raise ValueError(f"{broken[0]}; it cannot be adapted: leave it out with exclude={more}")
    in_order = [p for p in doubts if p in chosen]
    place = {p: i for i, p in enumerate(in_order)}
    spelled = {name: sorted(place.keys() & hits, key=place.__getitem__) for name, hits in meant.items()}
    return Selection(in_order, notes, left_out, spelled)


@dataclass(frozen=True)
class _Known:
    """What a model offers to a policy: projections with their doubts, heads, weights in no layer, and modules
    that are trained in full."""

    model: nn.Module
    doubts: Mapping[Projection, Doubt | None]
    heads: Mapping[str, str]
    unheld: Sequence[str]
    trained: Sequence[str]
    further: Mapping[Projection, Doubt | None]
    linear_by_name: Callable[[str], list[Projection]]
    further_by_name: Callable[[str], list[Projection]]

    def named(self, name: str, *, excluding: bool = False) -> set[Projection]:
        """The projections that ``name`` means; raises ValueError where it means nothing."""
        part, _, what = name.rpartition(":")
        if part:
            lies = within(self.model, part)
            if hits := {p for p in self.named(what, excluding=excluding) if lies(p.module)}:
                return hits
            raise ValueError(f"{name!r} matches no projection: {part} has none that {what!r} means")
        if name == "all-linear":
            return {p for p, doubt in self.doubts.items() if excluding or not self._left_out(p, doubt)}
        if name in _ROLES:
            offered = (*self.doubts, *self.further)
            hits = {p for p in offered if p.role == name and p.module not in self.heads}
            if hits:
                return hits
        # A name that linear projections have means these alone; embeddings and convolutions it means by
        # their whole path, or where nothing linear is called so.
        hits = set(self.linear_by_name(name))
        if excluding or not hits:
            hits.update(self.further_by_name(name))
        hits |= {p for p in self.further if p.name == name}
        if excluding:
            named = [path for path, _ in self.model.named_modules() if path and matches(path, name)]
            inside = under(named)
            hits |= {p for p in (*self.doubts, *self.further) if inside(p.module)}
            if named:
                return hits
        if hits:
            return hits
        if excluding and any(doubt and name in doubt.roles for doubt in self.doubts.values()):
            return set()
        what = "exclude" if excluding else "target"
        alone = [weight for weight in self.unheld if matches(weight, name)]
        if alone and excluding:
            return set()
        if alone:
            raise ValueError(f"{what}={name!r}: no linear layer holds {alone[0]}, so it cannot be adapted")
        if not excluding and (trained := [path for path in self.trained if matches(path, name)]):
            raise ValueError(
                f"target={name!r} names {trained[0]}, which train= trains in full: name it in one"
            )
        roles = [p.role.value for p in self.doubts if p.role != Role.OTHER]
        suggestions = nearest(
            name, [*(p.module for p in (*self.doubts, *self.further)), *(p.name for p in self.doubts), *roles]
        )
        raise ValueError(f"{what}={name!r} matches no projection{suggestions}")

    def check_role(self, said: str, name: str, among: Collection[Projection]) -> None:
        """Raises ValueError where the role ``name`` may lie in a weight of ``among`` that is not divided."""
        part, _, role = name.rpartition(":")
        if part:
            inside = within(self.model, part)
            among = {p for p in among if inside(p.module)}
        may_be = [
            (p, doubt) for p, doubt in self.doubts.items() if doubt and role in doubt.roles and p in among
        ]
        if may_be:
            first, doubt = may_be[0]
            leaf = (first.module if first.param == "weight" else first.param).rpartition(".")[2]
            more = f" (and {len(may_be) - 1} more like it)" if len(may_be) > 1 else ""
            whole = ", or name it in target= to adapt it as a whole" if doubt.adaptable else ""
            raise ValueError(
                f"{said} may mean rows of a weight that is not divided: {doubt.reason}{more}; "
                f"otherwise leave it out with exclude=({leaf!r},){whole}"
            )

    def _convolutions(self) -> list[str]:
        kind = nn.modules.conv._ConvNd
        return [path for path, module in self.model.named_modules() if isinstance(module, kind)]

    def _left_out(self, p: Projection, doubt: Doubt | None) -> bool:
        return p.module in self.heads or (doubt is not None and (doubt.routes or not doubt.adaptable))

    def left_out(
        self, target: Target, chosen: Collection[Projection], excluded: Collection[Projection]
    ) -> dict[str, str]:
        """Why each module or weight is left out that "all-linear" does not adapt; else nothing."""
        if callable(target) or "all-linear" not in as_names(target, "target"):
            return {}
        found = {}
        for p, doubt in self.doubts.items():
            if p not in chosen and p not in excluded:
                why = self.heads.get(p.module)
                found[p.module] = f"an output head ({why})" if why else doubt.why(p.module) if doubt else ""
        found |= dict.fromkeys(self.unheld, "no linear layer holds it")
        adapted = {p.module for p in chosen}
        convolutions = [path for path in self._convolutions() if path not in adapted]
        return found | dict.fromkeys(convolutions, "convolutions are not adapted")

    def notes(
        self,
        target: Target,
        chosen: Collection[Projection],
        excluded: Collection[Projection],
        left_out: Mapping[str, str],
    ) -> list[str]:
        """What a plan for ``target`` should say of what it adapts as a whole or leaves out."""
        found: dict[str, list[str]] = {}
        by_role = not callable(target) and any(map(_is_role, as_names(target, "target")))
        for p, doubt in self.doubts.items():
            if p in chosen:
                if doubt and doubt.roles:
                    found.setdefault(f"adapted as a whole, since {doubt.why(p.module)}", []).append(p.module)
            elif p in excluded or left_out:
                continue
            elif callable(target) and doubt and doubt.roles:
                found.setdefault(f"left out, and {doubt.why(p.module)}", []).append(p.module)
            elif by_role and p.role == Role.OTHER and p.module not in self.heads and not doubt:
                found.setdefault(ROLE_UNKNOWN, []).append(p.module)
        for name, why in left_out.items():
            found.setdefault(f"left out: {why}", []).append(name)
        large = large_weights(self.model, left_out)
        return [f"{listed(modules, large)}: {what}" for what, modules in found.items()]


def _is_role(name: str) -> bool:
    return name.rpartition(":")[2] in _ROLES


def _nothing_left(target: Target, exclude: Sequence[str], train: Sequence[str], notes: Sequence[str]) -> str:
    options = (("exclude", exclude), ("train", train))
    left = [f"{what}={as_names(names, what)}" for what, names in options if names]
    by = f"{' and '.join(left)} leaves" if left else "the model has"
    why = f" ({'; '.join(notes)}); name what to adapt in target=" if notes else ""
    return f"{by} nothing of target={target!r}{why}"
