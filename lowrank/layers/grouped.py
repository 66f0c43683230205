"""The product of a batch whose examples have adapters of their own: one grouped product, not a loop.

The factors of the adapters in use are stacked, padded with zeros to the largest rank, picked by example, and
multiplied by two `torch.bmm`. Ordinary operations, so autograd knows their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.adapter import RowBlocks
from lowrank.layers.block import Block
from lowrank.layers.gemm import down, up
from lowrank.layers.steps import steps
from lowrank.linalg.rows import spread


class Places(NamedTuple):
    """Which examples of a batch have one of some adapters, and which one each has.

    Args:
        used: the adapters' names.
        which: by example that has one: its place in ``used``.
        at: ``which``'s examples, as a tensor; None where these are all.
        pick: ``which`` as a tensor; None where it just counts up.
    """

    used: tuple[str, ...]
    which: list[int]
    at: Tensor | None
    pick: Tensor | None


class ExampleAdapters:
    """An adapter's name for each example of a batch, or None for the base alone.

    Args:
        names: one for each example.
        paths: of the adapted layers, by their ids: for error messages.
        repeats: an input may also hold each example so many times, one after the other.
    """

    def __init__(self, names: Sequence[str | None], paths: Mapping[int, str], repeats: int = 1) -> None:
        self.names, self.paths, self.repeats = tuple(names), paths, repeats
        self._known: dict[tuple[tuple[str, ...], int, torch.device], Places] = {}
        self._stacks: dict[tuple[int, torch.dtype], tuple[Any, Tensor, Tensor]] = {}

    def factors(self, layer: Any, parts: Sequence[RowBlocks], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`stacked` of ``parts``, which ``layer`` holds; where no graph is built, from an earlier call."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return stacked(parts, layer.out_features, dtype)
        seen = steps.watched(), [_identity(tensor) for part in parts for tensor in _factors(part)]
        key = id(layer), dtype
        if key not in self._stacks or self._stacks[key][0] != seen:
            with torch.inference_mode(False), torch.no_grad():
                self._stacks[key] = seen, *stacked(parts, layer.out_features, dtype)
        return self._stacks[key][1:]

    def path(self, layer: Any) -> str:
        return self.paths.get(id(layer), type(layer).__name__)

    def check(self, x: Tensor, layer: Any) -> None:
        """Raises ValueError where ``x`` does not show which of its rows belong to which example."""
        count = len(self.names)
        if x.dim() < 2 or x.shape[0] not in (count, count * self.repeats):
            more = f", or {count * self.repeats} with repeats={self.repeats}," if self.repeats > 1 else ","
            raise ValueError(
                f"{self.path(layer)}: expected an input of {count} examples, one for each name in "
                f"adapters_for_rows{more} as its leading dimension, or of two dimensions with one row an "
                f"example; got the shape {tuple(x.shape)}"
            )

    def used(self, parts: Mapping[str, RowBlocks]) -> tuple[str, ...]:
        """The names in use that ``parts`` has."""
        return tuple(name for name in dict.fromkeys(self.names) if name is not None and name in parts)

    def places(self, used: tuple[str, ...], examples: int, device: torch.device) -> Places:
        """Where among ``examples`` the adapters ``used`` are, made once for all layers that have these."""
        key = used, examples, device
        if key not in self._known:
            names = [name for name in self.names for _ in range(examples // len(self.names))]
            where = [i for i, name in enumerate(names) if name in used]
            which = [used.index(name) for name in names if name in used]
            with torch.inference_mode(False):
                at = None if len(where) == examples else torch.tensor(where, device=device)
                counts_up = which == list(range(len(used)))
                pick = None if counts_up else torch.tensor(which, device=device)
            self._known[key] = Places(used, which, at, pick)
        return self._known[key]


def _factors(part: RowBlocks) -> Iterator[Tensor]:
    for adapter in part.held():
        for tensor in (adapter.A, adapter.B, adapter.A0, adapter.B0):
            if tensor is not None:
                yield tensor


def _identity(tensor: Tensor) -> tuple[int, ...]:
    """Changes with what the tensor holds, unless it is written to as ``.data``, or by some optimizers."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def stacked(parts: Sequence[RowBlocks], rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A ``(names, r, in)`` and B ``(names, rows, r)`` with the scalings in B; r is the largest rank."""
    pairs = [_pair(part.blocks(), rows) for part in parts]
    most = max(len(A) for A, _ in pairs)
    A = torch.stack([_padded(A, (0, 0, 0, most - len(A))) for A, _ in pairs])
    B = torch.stack([_padded(B, (0, most - B.shape[1])) for _, B in pairs])
    return A.to(dtype), B.to(dtype)


def _pair(blocks: Sequence[Block], rows: int) -> tuple[Tensor, Tensor]:
    """One pair for all blocks of a weight with ``rows`` rows, anchors and scalings in it."""
    downs = [down(block.A, block.A0, block.A.dtype) for block in blocks]
    ups = []
    for block in blocks:
        B = block.scaling * up(block.B, block.B0, block.B.dtype)
        ups.append(B if block.rows == (0, rows) else spread(B.mT, block.rows, rows).mT)
    return (downs[0], ups[0]) if len(blocks) == 1 else (torch.cat(downs), torch.cat(ups, 1))


def _padded(factor: Tensor, zeros: tuple[int, ...]) -> Tensor:
    return F.pad(factor, zeros) if any(zeros) else factor  # which would be a copy without any, too


def add_grouped(
    y: Tensor,
    x: Tensor,
    layer: Any,
    parts: Mapping[str, RowBlocks],
    rows: ExampleAdapters,
    *,
    training: bool,
) -> Tensor:
    """``y`` plus, in each example, the update of the adapter that ``rows`` names for it.

    x ``(examples, …, in)``, y ``(examples, …, out)``. An example without an adapter keeps its bits in y.
    """
    used, which, at, pick = rows.places(rows.used(parts), len(y), y.device)
    held, x = [parts[name] for name in used], x.to(y.device, y.dtype)
    A, B = rows.factors(layer, held, y.dtype)
    if pick is not None:
        A, B = A[pick], B[pick]
    x = (x if at is None else x[at]).reshape(len(which), -1, x.shape[-1])
    if training and any(part.dropout for part in held):
        keep = torch.tensor([1 - held[i].dropout for i in which], device=x.device).view(-1, 1, 1)
        x = x * ((torch.rand(x.shape, device=x.device) < keep) / keep).to(x.dtype)
    S = torch.bmm(x, A.transpose(1, 2))
    update = torch.bmm(S, B.transpose(1, 2)).view(len(which), *y.shape[1:]).to(y.dtype)
    return y + update if at is None else y.index_add(0, at, update)
