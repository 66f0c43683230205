"""Which rows of a fused weight belong to which role: by table, by trial, or as the user says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn

from lowrank.linalg.rows import height, pieces
from lowrank.models.families import WRAPPERS, Role, in_attention, is_attention, is_named, role_of
from lowrank.models.fused_beside import made_of
from lowrank.models.layouts import (
    FUSED_NAMES,
    GATED_NAMES,
    LATENT,
    QKV,
    Blocks,
    gate_up,
    in_order,
    interleaved,
    layout_of,
)
from lowrank.models.patterns import matches, suffixes
from lowrank.models.storage import declared_shape, is_linear
from lowrank.models.structure import blocks_by_structure, blocks_by_trial

Fused = Mapping[str, Mapping[str, int]]
GROUPS = "groups"  # among the roles: how many times their rows follow each other


@dataclass(frozen=True)
class Doubt:
    """What is not known of a projection, or speaks against adapting it.

    Args:
        reason: in words; it begins with the module's path.
        roles: what may lie in it, where it is a fused weight that cannot be divided.
        adaptable: can it be adapted as a whole?
        routes: it chooses experts or tokens; it is adapted where it is named.
    """

    reason: str
    roles: frozenset[Role] = frozenset()
    adaptable: bool = True
    routes: bool = False

    def why(self, module: str) -> str:
        """The reason without the path of ``module``."""
        return self.reason.removeprefix(module).removeprefix(": ").strip()


def blocks_of(
    model: nn.Module,
    path: str,
    rows: int,
    columns: int,
    fused: Fused,
    attends: Callable[[str], bool],
    rows_named: Callable[[], Mapping[str, set[int]]],
) -> Blocks | Doubt:
    """Roles and rows of the blocks of one weight, or why they cannot be told.

    ``attends`` says of a module by path whether it is an attention: see `attending`; ``rows_named`` is of
    `heights`.
    """
    parent_path, _, name = path.rpartition(".")
    if name in WRAPPERS and parent_path.rpartition(".")[2].lower() in FUSED_NAMES:  # qkv.linear
        parent_path, _, leaf = parent_path.rpartition(".")
        name = f"{leaf}.{name}"
    parent, leaf = model.get_submodule(parent_path), name.lower().split(".")[0]
    layout = layout_of(parent, leaf) or made_of(parent, leaf)
    told = _told(path, rows, fused)
    try:
        known = layout(parent, rows) if layout else None
    except AttributeError:  # another version of the class
        layout = known = None
    if known and sum(height(own) for _, own in known) != rows:
        known = None
    kind, leave = type(parent).__name__, "leave it out of fused"
    if leaf in LATENT:
        why = f"{path}: {kind} has key and value of one latent, so no block of rows is the value's"
        if told:
            raise ValueError(f"{why}: fused= cannot divide it, {leave}")
        return Doubt(why, frozenset({Role.KEY, Role.VALUE}))
    if told and known and set(told) != set(known) and any(len(pieces(own)) > 1 for _, own in known):
        order = "interleaves query, key and value head by head"
        raise ValueError(f"{path}: {kind} {order}, and is divided so without fused=: {leave}")
    if told:
        return told
    if known:
        return known
    if leaf == "in_proj" and not in_attention(parent_path):
        return in_order([(role_of(path), rows)])  # a state-space block's has none
    if leaf in FUSED_NAMES:
        holds = FUSED_NAMES[leaf]
        shown = blocks_by_trial(model, path)
        if shown and set(holds) <= {role for role, _ in shown}:
            return shown
        return Doubt(_ask_for_rows(path, rows, holds, rows_named()), frozenset(holds))
    if leaf in GATED_NAMES and rows % 2 == 0:
        return gate_up(parent, rows)
    if leaf == "wi":
        output = getattr(parent, "Wo", None)
        if getattr(output, "in_features", None) == rows // 2:
            return gate_up(parent, rows)
    role = role_of(path, attends=attends(parent_path))
    if role == Role.UP and _holds_two(parent, rows, columns):
        holds = (Role.GATE, Role.UP)
        return blocks_by_trial(model, path) or Doubt(
            _ask_for_rows(path, rows, holds, rows_named()), frozenset(holds)
        )
    if not is_named(path):  # what a block computes goes before the words of a name
        shown = blocks_by_structure(model, path)
        if shown and credible(model, path, shown):
            return shown
    return in_order([(role, rows)])


def _holds_two(parent: nn.Module, rows: int, columns: int) -> bool:
    """Is there a layer beside an up of ``rows`` that takes half as many, so that it holds a gate, too?"""
    beside = {declared_shape(child) for child in parent.children() if is_linear(child)}
    return (columns, rows // 2) in beside and (columns, rows) not in beside and rows % 2 == 0


def credible(model: nn.Module, path: str, shown: Blocks) -> bool:
    """Beside a layer that is named query, key or value, no other is that too: it may be for positions."""
    parent = path.rpartition(".")[0]
    beside = {f"{parent}.{name}": child for name, child in model.get_submodule(parent).named_children()}
    named = {role_of(other) for other, child in beside.items() if is_linear(child)}
    return named.isdisjoint({role for role, _ in shown}.intersection(QKV))


def attending(model: nn.Module) -> Callable[[str], bool]:
    """`_attends` in ``model``, asked once of each path: it looks at all children, and each child asks."""
    return cache(lambda path: _attends(model, path))


def _attends(model: nn.Module, path: str) -> bool:
    """Is the module ``path``, or what holds it where it is a list such as ``to_out``, an attention?"""
    module = model.get_submodule(path)
    if isinstance(module, nn.Sequential | nn.ModuleList) and not is_attention(dict(module.named_children())):
        module = model.get_submodule(path.rpartition(".")[0])
    return is_attention(dict(module.named_children()))


def _told(path: str, rows: int, fused: Fused) -> Blocks | None:
    patterns = [pattern for pattern in fused if matches(path, pattern)]
    if not patterns:
        return None
    pattern = max(patterns, key=lambda each: (each.count("."), len(each)))
    sizes = dict(fused[pattern])
    groups = sizes.pop(GROUPS, 1)
    if groups * sum(sizes.values()) != rows or min(groups, *sizes.values(), rows) < 1:
        said, times = f"fused[{pattern!r}] = {dict(fused[pattern])}", f", {GROUPS} times," * (groups != 1)
        raise ValueError(
            f"{said} must add up{times} to the {rows} rows of {path}; a longer pattern can name it alone"
        )
    return interleaved(groups, [(Role(role), size) for role, size in sizes.items()])


def heights(model: nn.Module) -> Callable[[], Mapping[str, set[int]]]:
    """The rows of the linear layers of ``model`` that each suffix of a path names; found when first asked."""

    @cache
    def found() -> Mapping[str, set[int]]:
        rows: dict[str, set[int]] = {}
        for path, module in model.named_modules():
            if path and is_linear(module) and (shape := declared_shape(module)) is not None:
                for suffix in suffixes(path):
                    rows.setdefault(suffix, set()).add(shape[0])
        return rows

    return found


def _ask_for_rows(path: str, rows: int, roles: tuple[Role, ...], named: Mapping[str, set[int]]) -> str:
    """The reason, with the shortest pattern that names no weight of another height."""
    pattern = next((each for each in suffixes(path) if named.get(each, {rows}) == {rows}), path)
    said = ", ".join(f'"{role}": rows' for role in roles)
    return (
        f"{path}: it is not known where {' and '.join(roles)} lie in its {rows} rows; give them with "
        f'fused={{"{pattern}": {{{said}}}}}, in the order of storage; where they are interleaved, '
        f'add "{GROUPS}": the number of groups, and give the rows of one group'
    )
