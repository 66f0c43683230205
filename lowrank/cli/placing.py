"""Which matrices of a checkpoint an adapter's updates belong to: tensors, or slices of a tensor of experts.

The model has a layer's experts in one tensor; its checkpoint may have each expert in tensors of its own. This
looks at names and shapes; `merge` compares the values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lowrank.cli.saved import Update
from lowrank.cli.shards import DTYPES, Stored, resolve
from lowrank.files import AdapterError
from lowrank.linalg.rows import shifted

EXPERT = re.compile(r"(\d+|shared)\.(\w+)")  # the label of an expert's rows
# What the tensors of one expert are called, by the role in the label.
OWN_NAMES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


@dataclass(frozen=True)
class Matrix:
    """One matrix of a checkpoint, and the updates that are added to it, their rows counted within it.

    Args:
        tensor: the name of the tensor that it is, or lies in.
        name: for messages.
    """

    tensor: str
    name: str
    stored: Stored
    updates: tuple[Update, ...]


class Names:
    """The names of a checkpoint's tensors, as those who ask spell them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._known = {_spelled(name): name for name in names}

    def find(self, wanted: str) -> str:
        """See `shards.resolve`."""
        try:
            return self._known[resolve(self._known, _spelled(wanted))]
        except AdapterError as error:
            raise AdapterError(str(error).replace(_spelled(wanted), wanted, 1)) from None


def _spelled(name: str) -> str:
    """Mixtral and its kin: transformers 5 calls it otherwise than their checkpoints."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def matrices(
    stored: Mapping[str, Stored], names: Names, weight: str, updates: Sequence[Update]
) -> Iterator[Matrix]:
    """The matrices of the checkpoint that ``updates``, all those of one weight, belong to.

    Raises AdapterError where it holds no such weight, or another number of experts.
    """
    of_experts = all(EXPERT.fullmatch(update.label) for update in updates)
    try:
        tensor = names.find(weight)
    except AdapterError as error:
        if not of_experts:
            raise
        yield from _apart(stored, names, weight, updates, error)
        return
    if of_experts and stored[tensor].dtype in DTYPES:
        yield from _slices(tensor, stored[tensor], updates)
    else:
        yield Matrix(tensor, tensor, stored[tensor], tuple(updates))


def _slices(tensor: str, stored: Stored, updates: Sequence[Update]) -> Iterator[Matrix]:
    """The slices of a tensor of experts, ``(experts, out, in)`` or ``(experts, in, out)``.

    DBRX has the same in two dimensions.
    """
    columns = updates[0].pair.A.shape[1]
    shape = stored.shape
    if len(shape) == 2:
        one = updates[0].pair.B.shape[0] if shape[1] == columns else columns
        shape = (shape[0] // one, one, shape[1])
    if len(shape) != 3 or columns not in shape[1:]:
        raise AdapterError(f"{tensor}: expected experts with {columns} columns, got the shape {stored.shape}")
    experts, first, second = shape
    out = first if second == columns else second
    held: dict[int, list[Update]] = {}
    for update in updates:
        if update.shared > 1:
            each = range(update.shared)
            own = [replace(update, expert=e) for e in each]
        else:
            each = range(update.rows[0] // out, update.rows[0] // out + 1)
            own = [replace(update, rows=shifted(update.rows, -e * out)) for e in each]
        if each.stop > experts or (update.shared > 1 and each.stop != experts):
            raise AdapterError(f"{tensor}: expected {each.stop} experts, got the shape {stored.shape}")
        for e, part in zip(each, own, strict=True):
            held.setdefault(e, []).append(part)
    size = first * second * DTYPES[stored.dtype].itemsize
    for e, parts in sorted(held.items()):
        matrix = replace(stored, shape=(first, second), start=stored.start + e * size)
        yield Matrix(tensor, f"{tensor}[{e}]", matrix, tuple(parts))


def _apart(
    stored: Mapping[str, Stored], names: Names, weight: str, updates: Sequence[Update], error: AdapterError
) -> Iterator[Matrix]:
    """The tensors of single experts: gate and up are apart there."""
    module = weight.rpartition(".")[0]
    for update in updates:
        which, _, role = update.label.partition(".")
        for e in range(update.shared) if update.shared > 1 else [int(which)]:
            tensor = _first_found(names, [f"{module}.{e}.{own}.weight" for own in OWN_NAMES.get(role, ())])
            if tensor is None:
                alone = "and none of a single expert by a known name"
                raise AdapterError(f"{error}, {alone}: load the model and use lowrank.merge")
            shape = update.pair.B.shape[0], update.pair.A.shape[1]
            if stored[tensor].shape not in (shape, shape[::-1]):
                raise AdapterError(f"{tensor}: expected the shape {shape}, got {stored[tensor].shape}")
            own = replace(update, rows=(0, shape[0]), expert=e if update.shared > 1 else 0)
            yield Matrix(tensor, tensor, stored[tensor], (own,))


def _first_found(names: Names, wanted: Iterable[str]) -> str | None:
    for name in wanted:
        try:
            return names.find(name)
        except AdapterError:
            continue
    return None
