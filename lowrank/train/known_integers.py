"""Keeps the numbers of integers in a step without numbers, as far as they follow from the batch alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MOST = 2**22  # elements of a tensor that keeps its numbers


class KnownIntegers(TorchDispatchMode):
    """Inside a mode of tensors without numbers, integers and truth values that follow from real ones stay.

    Models look at them before they choose a kernel: is anything padded, where does a packed sequence begin.
    What follows from a tensor without numbers has none; neither has a result of more than `MOST` elements.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import (
            DataDependentOutputException,
            DynamicOutputShapeException,
            unset_fake_temporarily,
        )

        kwargs = kwargs or {}
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        if not all(is_known(tensor) for tensor in given):
            return func(*args, **kwargs)
        try:
            shaped = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            shaped = None  # it can be told from numbers alone, which are there
        made = [each for each in tree_iter(shaped) if isinstance(each, Tensor)]
        if not all(_is_whole(t) and t.numel() <= MOST and t.device.type != "meta" for t in made):
            return shaped
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def is_known(tensor: Tensor) -> bool:
    """Is it a plain tensor of integers or truth values that has its numbers?"""
    return type(tensor) is Tensor and _is_whole(tensor) and not tensor.is_meta


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
