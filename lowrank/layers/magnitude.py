"""DoRA (2402.09353): the magnitude of each output row is trained apart from its direction.

``W' = m · (W + ΔW) / ‖W + ΔW‖``, row by row. The product stays ``base + update``, and each column of the
output is then multiplied by ``m / ‖W + ΔW‖``. The norm is a constant to backward, as in the paper's eq. 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lowrank.layers.functional import Block
from lowrank.layers.gemm import down, up
from lowrank.linalg.precision import without_autocast
from lowrank.linalg.rows import spread, take

if TYPE_CHECKING:
    from lowrank.layers.adapter import Adapter

Times = Callable[[Tensor], Tensor]  # x (n, in) → x·Wᵀ (n, out), without bias


class Magnitude(nn.Module):
    """The magnitudes ``start + offset`` of some rows of a weight; ``offset`` is trained, and zero at first.

    ``norms`` are the base's own row norms. They are not saved: they belong to the base that the adapter hangs
    on. Where ``start`` is equal to them, and ΔW is zero, nothing is changed, bit for bit, also in another
    dtype: the root of a number's square is that number.

    Args:
        norms: (rows,), of the base.
        start: (rows,), the magnitudes before training; by default those of the base.
    """

    norms: Tensor
    start: Tensor

    def __init__(self, norms: Tensor, start: Tensor | None = None) -> None:
        super().__init__()
        norms = norms.detach()
        start = norms.clone() if start is None else start.detach().to(norms)
        if start.shape != norms.shape:
            raise ValueError(f"expected {tuple(norms.shape)} magnitudes, got {tuple(start.shape)}")
        self.offset = nn.Parameter(torch.zeros_like(norms))
        self.register_buffer("start", start)
        self.register_buffer("norms", norms, persistent=False)

    def values(self) -> Tensor:
        """The magnitudes (rows,), differentiable."""
        return self.start + self.offset

    def excess(self, block: Block, times: Times) -> Tensor:
        """``m / ‖W + ΔW‖ − 1`` (rows,), differentiable in m alone; exactly zero before training.

        With ``P = W·Aᵀ`` and ``G = A·Aᵀ`` the squared norms are those of W plus the row sums of
        ``s·B ∘ (2·P + s·B·G)``: W + ΔW is not formed.
        """
        held = self.norms
        dtype = torch.promote_types(torch.float32, held.dtype)
        with torch.no_grad(), without_autocast(held):
            A = down(block.A, block.A0, dtype)
            B = block.scaling * up(block.B, block.B0, dtype)
            P = take(times(A), block.rows, dim=1).t().to(dtype)
            added = (B * (2 * P + B @ (A @ A.t()))).sum(1)
            norms = (held.to(dtype).square() + added).clamp_min(torch.finfo(dtype).tiny).sqrt()
        return (self.values() - norms) / norms

    def follow(self, norms: Tensor, *, start: bool) -> None:
        """The base's rows have other ``norms`` now; with ``start`` the magnitudes start from them."""
        self.norms = norms.to(self.norms)
        if start:
            self.start = norms.to(self.start)


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each row, in fp32 or better; some rows at a time."""
    dtype = torch.promote_types(torch.float32, weight.dtype)
    return torch.cat([rows.detach().to(dtype).square().sum(1).sqrt() for rows in weight.split(1024)])


def excess_of(adapters: Sequence[Adapter], times: Times, out: int) -> Tensor:
    """`Magnitude.excess` of all rows (out,) of a weight: zero where no adapter has a magnitude."""
    parts = [
        spread(adapter.magnitude.excess(adapter.block, times), adapter.rows, out)
        for adapter in adapters
        if adapter.magnitude is not None
    ]
    return sum(parts[1:], start=parts[0])


def rescaled(y: Tensor, bias: Tensor | None, excess: Tensor) -> Tensor:
    """``(y − bias)·(1 + excess) + bias`` by columns; y ``(..., out)`` bit for bit where excess is zero."""
    product = y if bias is None else y - bias.to(y.dtype)
    return torch.addcmul(y, product, excess.to(y.dtype))


def multiplied_by(base: nn.Module, weight: Tensor | None, dtype: torch.dtype) -> Times:
    """Multiplies by the weight of ``base``: ``weight`` (out, in), or by calling it where that is None."""

    def times(x: Tensor) -> Tensor:
        if weight is not None:
            return nn.functional.linear(x.to(weight.dtype), weight)
        y, bias = base(x.to(dtype)), cast("Tensor | None", base.bias)
        return y if bias is None else y - bias.to(y.dtype)

    return times
