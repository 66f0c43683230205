"""Roles by who consumes whose output, as a trial of a block shows it.

Softmax attention: where the query is zero, nothing depends on the keys any more; the values then have other
weights, which add up to what they added up to before. Rows of a fused weight are told one by one. In a
feed-forward block, of the outputs that are multiplied, the gate is the one that goes through an activation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank.linalg.rows import Rows, repeating
from lowrank.models.families import Role
from lowrank.models.influence import Run, Trial, live
from lowrank.models.layouts import Blocks, in_order
from lowrank.models.storage import declared_shape

EQUAL, CHANGED = 1e-8, 1e-5  # relative, in fp64

Masks = dict[str, Tensor]  # by layer: which of its rows, (rows,) bool


def roles_by_use(trial: Trial) -> dict[str, Blocks]:
    """Roles and rows of the linear layers of a block, by path; a layer that shows none is not there.

    Raises whatever the block's code raises.
    """
    run = trial.run()
    roles: dict[Role, Masks] = {role: {} for role in Role}
    for place in range(len(run.seen)):
        for role, masks in _attention(trial, run, place).items():
            for name, mask in masks.items():
                roles[role][name] = roles[role].get(name, torch.zeros_like(mask)) | mask
    whole: dict[str, Role] = {}
    if roles[Role.VALUE]:
        whole |= dict.fromkeys(_outputs(trial, run, roles[Role.VALUE]), Role.OUTPUT)
    attends = {name for masks in roles.values() for name in masks} | whole.keys()
    found = {name: in_order([(role, _rows(trial, name))]) for name, role in whole.items()}
    for name in attends - whole.keys():
        blocks = _blocks({role: masks[name] for role, masks in roles.items() if name in masks})
        if blocks:
            found[name] = blocks
    for place, (name, _) in enumerate(run.seen):
        if name in run.outputs and name not in attends:
            feeding = _feed_forward(trial, run, place)
            found |= {each: own for each, own in feeding.items() if each not in attends and each not in found}
    return found


# -- attention ----------------------------------------------------------------------------------------


def _attention(trial: Trial, run: Run, place: int) -> dict[Role, Masks]:
    """Query, key and value of an attention whose result is ``run.seen[place]``; else nothing."""
    if place and run.seen[place - 1][1] is run.seen[place][1]:
        return {}
    gradients = run.gradients(place)
    largest = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
    counts = {name: live(g, largest).sum(0) for name, g in gradients.items()}
    spread = {name: count > 1 for name, count in counts.items() if (count > 1).any()}
    found: dict[Role, Masks] = {}
    for name in [name for name, count in counts.items() if (count == 1).any()] if spread else []:
        local = counts[name] == 1
        without = trial.run({name: _but(local)}).gradients(place)
        keys, values = _keys_and_values(gradients, without, spread, largest)
        if not keys or not values:
            continue
        again = trial.run({key: _but(mask) for key, mask in keys.items()}).gradients(place)
        query = local & _moved(gradients[name], again.get(name))
        if query.any():
            for role, masks in ((Role.QUERY, {name: query}), (Role.KEY, keys), (Role.VALUE, values)):
                found.setdefault(role, {}).update(masks)
    return found


def _keys_and_values(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], spread: Masks, largest: float
) -> tuple[Masks, Masks]:
    """By gradients before and ``after`` the query is zero: the rows that nothing depends on any more, and
    those that are weighted otherwise, with the same sum."""
    keys, values = {}, {}
    for name, rows in spread.items():
        was = before[name]
        now = torch.zeros_like(was) if after.get(name) is None else after[name]
        gone = rows & ~live(now, largest).any(0)
        size = was.abs().max()
        same_sum = (was.sum(0) - now.sum(0)).abs() <= EQUAL * size * len(was)
        same_sum &= was.sum(0).abs() > CHANGED * size  # what is added to the logits has a sum of zero
        if gone.any():
            keys[name] = gone
        if (kept := rows & ~gone & same_sum & _moved(was, now)).any():
            values[name] = kept
    positions = {len(before[name]) for name in values}
    keys = {name: mask for name, mask in keys.items() if len(before[name]) in positions}
    return keys, values


def _moved(was: Tensor, now: Tensor | None) -> Tensor:
    """The rows whose gradients differ; None are zeros."""
    change = was if now is None else was - now
    return change.abs().amax(0) > CHANGED * was.abs().amax(0)


def _outputs(trial: Trial, run: Run, values: Masks) -> list[str]:
    """The layers that consume what the values are summed to, and nothing else."""
    without = trial.run({name: _but(mask) for name, mask in values.items()})
    found = []
    for place, (name, _) in enumerate(run.seen):
        if name not in run.outputs or name in values:
            continue
        gradients = run.gradients(place)
        if not any(name in gradients and gradients[name][:, mask].any() for name, mask in values.items()):
            continue
        flat = without.seen[place][1].flatten(0, -2)
        if (flat - flat[:1]).abs().max() <= EQUAL * run.seen[place][1].abs().max():
            found.append(name)
    return found


# -- feed-forward -------------------------------------------------------------------------------------


def _feed_forward(trial: Trial, run: Run, place: int) -> dict[str, Blocks]:
    """Gate, up and down, where the layer that is called with ``run.seen[place]`` is a down; else nothing.

    What it is called with may be the normalized product: the product itself is looked at, too.
    """
    down, given = run.seen[place]
    out, columns = _shape(trial, down)
    feeding = _fed_by(run, place)
    if any((live(g, 1.0).sum(0) > 1).any() for g in feeding.values()):
        return {}
    if any(_shape(trial, name)[1] != out for name in feeding):
        return {}
    for earlier in range(place, -1, -1):
        if run.seen[earlier][1].shape == given.shape and _fed_by(run, earlier).keys() == feeding.keys():
            found = _gate_and_up(trial, run, earlier, columns)
            gated = any(role == Role.GATE for own in found.values() for role, _ in own)
            if found and (gated or out < columns):  # two layers with an activation between may be anything
                return {down: in_order([(Role.DOWN, out)]), **found}
    return {}


def _fed_by(run: Run, place: int) -> dict[str, Tensor]:
    """The gradients of ``run.seen[place]`` that are not zero, the largest 1."""
    gradients = {name: g for name, g in run.gradients(place).items() if g.any()}
    largest = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
    return {name: g / largest for name, g in gradients.items()}


def _gate_and_up(trial: Trial, run: Run, place: int, columns: int) -> dict[str, Blocks]:
    """By which of the outputs that are multiplied acts in proportion; one alone is an up that does not."""
    gradients = _fed_by(run, place)
    parts: list[tuple[str, Tensor]] = []  # what may be gate or up: columns rows each
    for name, gradient in gradients.items():
        rows = gradient.shape[1]
        for start in range(0, rows, columns) if rows in (columns, 2 * columns) else ():
            mask = torch.zeros(rows, dtype=torch.bool, device=gradient.device)
            mask[start : start + columns] = True
            parts.append((name, mask))
    if len(parts) not in (1, 2) or {name for name, _ in parts} != set(gradients):
        return {}
    bent = [not _in_proportion(trial, place, name, mask) for name, mask in parts]
    if sum(bent) != 1:
        return {}
    named: dict[str, list[Role]] = {}
    for (name, _), through in zip(parts, bent, strict=True):
        named.setdefault(name, []).append(Role.GATE if through and len(parts) == 2 else Role.UP)
    return {name: in_order([(role, columns) for role in own]) for name, own in named.items()}


def _in_proportion(trial: Trial, place: int, name: str, mask: Tensor) -> bool:
    """Does it not matter to these rows' gradients what they are? ReLU is in proportion above 0 only."""
    slopes = []
    for factor in (1.0, -2.0):
        factors = torch.where(mask, factor, 1.0).double()
        slopes.append(trial.run({name: factors}).gradients(place)[name][:, mask])
    was, turned = slopes
    return bool((turned - was).abs().max() <= CHANGED * was.abs().max())


# -- rows ---------------------------------------------------------------------------------------------


def _but(mask: Tensor) -> Tensor:
    """Factors that make the rows of ``mask`` zero."""
    return (~mask).double()


def _shape(trial: Trial, name: str) -> tuple[int, int]:
    shape = declared_shape(trial.copy.get_submodule(name))
    assert shape is not None
    return shape


def _rows(trial: Trial, name: str) -> int:
    return _shape(trial, name)[0]


def _blocks(masks: Mapping[Role, Tensor]) -> Blocks:
    """The rows of each role, in the order in which they are stored, and the others as one block of their own.

    Empty where two roles claim a row, or rows do not repeat as `Rows` can say.
    """
    claimed = torch.stack([mask.int() for mask in masks.values()]).sum(0)
    if (claimed > 1).any():
        return []
    parts = dict(masks)
    if (claimed == 0).any():
        parts[Role.OTHER] = claimed == 0
    blocks = [(role, _as_rows(mask)) for role, mask in parts.items()]
    found = [(role, rows) for role, rows in blocks if rows is not None]
    return sorted(found, key=lambda block: block[1][0]) if len(found) == len(blocks) else []


def _as_rows(mask: Tensor) -> Rows | None:
    """The rows of ``mask`` as equal pieces at equal distances; None where they are not."""
    rows = mask.nonzero().flatten().tolist()
    starts = [row for row in rows if row - 1 not in set(rows)]
    size, groups = len(rows) // len(starts), len(starts)
    stride = starts[1] - starts[0] if groups > 1 else size
    made = [start + i for start in range(starts[0], starts[0] + groups * stride, stride) for i in range(size)]
    return repeating(starts[0], size, stride, groups) if made == rows else None
