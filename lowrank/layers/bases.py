"""What the base of an adapted layer computes: a plain product, one with a dequantized weight, or more."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

# Products with a dequantized weight, by the package and the name of the class: not tried out.
PRODUCTS = {
    *(("bitsandbytes", name) for name in ("Linear4bit", "LinearFP4", "LinearNF4", "Linear8bitLt")),
    ("transformers", "FP8Linear"),
}


def plain_weight(base: nn.Module) -> Tensor | None:
    """The weight ``(out, in)`` of a base that the fused product may read, else None.

    Plain means: nothing but ``x·Wᵀ + b`` happens when it is called. Subclasses, hooks, parametrizations,
    replaced forwards and tensor subclasses (quantized, distributed) keep their own call.
    """
    parameters = base._parameters
    weight = parameters.get("weight")
    if (
        weight is None
        or not (
            type(weight) in (nn.Parameter, Tensor) or (fake(weight) and not torch.compiler.is_compiling())
        )
        or not weight.is_floating_point()
        or weight.itemsize == 1  # fp8, which nothing multiplies by without a scale
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    ):
        return None
    if type(base) is nn.Linear:
        return weight
    if type(base).__name__ == "Conv1D" and getattr(base, "nf", None) == weight.shape[1]:
        return weight.t()
    return None


def fake(weight: Tensor) -> bool:
    """Is it a stand-in without numbers, as torch.export traces with? Told by name: its import takes long."""
    return type(weight).__name__ == "FakeTensor"


@torch.no_grad()
def multiplies(base: nn.Module, weight: Tensor) -> bool:
    """Is calling ``base`` to multiply by ``weight`` (out, in) and add its bias, and no more than that?

    A layer with a forward of its own, or with hooks, is tried out on a copy, since a call may change a layer
    (some pack their weight in the first one); 5 % are allowed, for those that quantize their input.

    Raises:
        ValueError: it cannot be called.
    """
    kind, bias = type(base), cast("Tensor | None", base.bias)
    plain = kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D"
    known = (kind.__module__.partition(".")[0], kind.__name__) in PRODUCTS
    hooks = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
    if (plain or known) and not hooks:
        return True
    dtype = weight.dtype if bias is None else bias.dtype
    x = torch.arange(3.0 * weight.shape[1], device=weight.device).cos().view(3, -1).to(dtype)
    wanted = nn.functional.linear(x, weight.to(dtype), bias)
    try:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            y = copy.deepcopy(base)(x)
    except (RuntimeError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"the forward of {kind.__name__} cannot be tried out here: {error}") from error
    return y.shape == wanted.shape and bool((y - wanted).norm() <= 0.05 * wanted.norm())


def master_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of an adapter's parameters: fp32, and fp64 on an fp64 base."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32
