"""Shapes of grouped products: PyTorch multiplies in any dtype on a CPU, and knows the shapes in bf16 only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class GroupedShapes(TorchDispatchMode):
    """Inside a mode of tensors without numbers, answers for ``aten._grouped_mm`` with such a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(torch.ops.aten, "_grouped_mm", None)
        if name is not None and func is name.default and args[0].dtype != torch.bfloat16:
            return _grouped(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, dtype: Any = None
) -> Tensor:
    """Empty, of the product's shape: groups of rows, of columns, of what is summed over, or of pairs."""
    groups = len(offs) if offs is not None else len(a)
    leading = [groups] if a.dim() == b.dim() else []
    return a.new_empty([*leading, a.shape[-2], b.shape[-1]], dtype=dtype or a.dtype)
