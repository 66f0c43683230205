"""`LoRAEmbedding`: a frozen embedding with low-rank updates, looked up row by row and never formed."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.layers.layer import StandIn
from lowrank.layers.offsets import TokenOffsets
from lowrank.layers.reading import TRANSPOSED, Layout


class LoRAEmbedding(StandIn):
    """``y = base(ids) + Σ scaling · Aᵀ[ids]·Bᵀ`` for an ``nn.Embedding`` of weight (vocabulary, dim).

    A is ``(rank, vocabulary)`` and B is ``(dim, rank)``: the weight as the matrix that maps a one-hot vector
    to an embedding. A token that ``padding_idx`` names gets no gradient. A subclass with a forward of its
    own, such as one that multiplies by √dim, is called with Aᵀ in the place of its weight.
    Dropout does not act. Rows that train apart are looked up beside it; for a forward of its own that takes a
    table (vocabulary, rows) in each call.
    """

    @property
    def layout(self) -> Layout:
        return TRANSPOSED

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._refuse_rows()
        y: Tensor = self.base(*args, **kwargs)
        for part, factor in self._acting():
            for _, A, B, scaling, A0, B0 in part.blocks(factor):
                found = self._look_up(A, args, kwargs).to(y.dtype)
                start = found if A0 is None else found + self._look_up(A0, args, kwargs).to(y.dtype)
                update = F.linear(start, B.to(y.dtype))
                if B0 is not None:
                    update = update + F.linear(found, B0.to(y.dtype))
                y = y + (scaling * update).to(y.dtype)
            if part.tokens is not None:
                y = self._moved(y, part.tokens, factor, args, kwargs)
        return y

    def _moved(
        self,
        y: Tensor,
        tokens: TokenOffsets,
        factor: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """``y`` plus the offsets of the rows that were looked up: added in fp32, and rounded once."""
        base = cast(nn.Embedding, self.base)
        if type(base) is nn.Embedding:
            ids = args[0] if args else kwargs["input"]
            update = tokens.found(ids, factor, by_frequency=base.scale_grad_by_freq)
        else:
            chosen = self._look_up(tokens.selection(base.num_embeddings, base.weight.dtype), args, kwargs)
            offsets = tokens.scaled(factor)
            update = chosen.to(offsets.dtype) @ offsets
        return (y.to(update.dtype) + update).to(y.dtype)

    def _look_up(self, A: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the base makes of its arguments with Aᵀ as its weight: (..., rank)."""
        base = self.base
        if type(base) is nn.Embedding:
            ids = args[0] if args else kwargs["input"]
            return F.embedding(ids, A.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return functional_call(base, {"weight": A.t()}, args, kwargs)
