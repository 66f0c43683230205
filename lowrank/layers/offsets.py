"""Some rows of an embedding that train: what is added to them, beside a weight that is never written.

The same object serves each module that shares the weight: a lookup, and a head that multiplies by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.layers.functional import Block


class TokenOffsets(nn.Module):
    """``W[ids] + offsets`` in the place of ``W[ids]``, of a weight W ``(vocabulary, dim)``.

    Args:
        ids: of the rows, ascending.
        offsets: (ids, dim), fp32 also on a half-precision base (fp64 on an fp64 one); zero at first.
    """

    index: Tensor

    def __init__(self, ids: Sequence[int], offsets: Tensor) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.offsets = nn.Parameter(offsets)
        self.register_buffer("index", torch.tensor(self.ids, device=offsets.device), persistent=False)

    def trained(self) -> Iterator[nn.Parameter]:
        """What it trains, whether it requires grad now or not."""
        yield self.offsets

    def scaled(self, weight: Tensor | None) -> Tensor:
        """The offsets, multiplied by ``weight``; None is 1."""
        return self.offsets if weight is None else self.offsets * weight

    def found(self, ids: Tensor, weight: Tensor | None, *, by_frequency: bool = False) -> Tensor:
        """The offset of each of ``ids``, zero where it has none: (…, dim)."""
        at = torch.searchsorted(self.index, ids.to(self.index.dtype)).clamp(max=len(self.ids) - 1)
        none = len(self.ids)
        at = torch.where(self.index[at] == ids, at, none)
        table = F.pad(self.scaled(weight), (0, 0, 0, 1))
        return F.embedding(at, table, none, scale_grad_by_freq=by_frequency)

    def multiplied(self, y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """``y`` (…, vocabulary) plus the products of x (…, dim) with the offsets: of a head that has W."""
        update = F.linear(x, self.scaled(weight).to(x.dtype))
        return y.index_add(-1, self.index, update.to(y.dtype))

    def selection(self, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """(ids, vocabulary): each row has a one where its id is."""
        zeros = self.index.new_zeros(len(self.ids), vocabulary, dtype=dtype)
        return zeros.scatter(1, self.index[:, None], 1.0)

    def block(self, shape: tuple[int, int], *, transposed: bool) -> Block:
        """The update of the whole matrix of ``shape`` (out, in), as a product: for code that wants factors.

        ``transposed``: it is Wᵀ (dim, vocabulary), as an embedding has it, and not W.
        """
        selection = self.selection(shape[1] if transposed else shape[0], self.offsets.dtype)
        A, B = (selection, self.offsets.t()) if transposed else (self.offsets, selection.t())
        return Block((0, shape[0]), A, B, 1.0, None, None)

    def extra_repr(self) -> str:
        return f"{len(self.ids)} rows of {self.offsets.shape[1]}"
