"""`LoRAConv`: a frozen convolution with low-rank updates, convolutions to ``rank`` channels and back."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.layer import StandIn
from lowrank.layers.reading import FLATTENED, Layout

POINTWISE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight


class LoRAConv(StandIn):
    """``y = base(x) + Σ scaling · B * (A * x)`` for an ``nn.Conv1d``, ``2d`` or ``3d`` with groups=1.

    A ``(rank, in · kernel)`` is a convolution with the base's kernel, stride, padding and dilation, B
    ``(out, rank)`` one with a kernel of 1. Dropout is on x, for the adapters alone.
    """

    @property
    def layout(self) -> Layout:
        return FLATTENED

    def forward(self, input: Tensor) -> Tensor:
        self._refuse_rows()
        y: Tensor = self.base(input)
        base: Any = self.base
        kernel = cast(Tensor, base.weight).shape[1:]
        pointwise = POINTWISE[len(kernel) + 1]
        ones = (1,) * (len(kernel) - 1)
        for part, factor in self._acting():
            x = F.dropout(input, part.dropout, self.training)

            def down(A: Tensor, x: Tensor = x) -> Tensor:
                return base._conv_forward(x, A.to(x.dtype).unflatten(1, kernel), None)

            for _, A, B, scaling, A0, B0 in part.blocks(factor):
                found = down(A)
                start = found if A0 is None else found + down(A0)
                update = pointwise(start, B.to(start.dtype).unflatten(1, (-1, *ones)))
                if B0 is not None:
                    update = update + pointwise(found, B0.to(found.dtype).unflatten(1, (-1, *ones)))
                y = y + (scaling * update).to(y.dtype)
        return y
