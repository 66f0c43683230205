"""`LoRALinear`: a frozen linear layer with its low-rank updates beside it.

It runs any Linear-like base and never writes to it. The product itself is in `ops`, the parameters
in `adapter`; it knows no model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.layers.adapter import Adapter, full_delta
from lowrank.layers.functional import add_lora, fused_lora
from lowrank.layers.loading import move_below_base
from lowrank.layers.reading import read_weight, readable

# Products with a dequantized weight, by the package and the name of the class: not tried out.
PRODUCTS = {
    *(("bitsandbytes", name) for name in ("Linear4bit", "LinearFP4", "LinearNF4", "Linear8bitLt")),
    ("transformers", "FP8Linear"),
}


class LoRALinear(nn.Module):
    """``y = base(x) + Σ scaling · x·Aᵀ·Bᵀ``, each term on its own rows of the output.

    The base may be an ``nn.Linear``, a Conv1D (weight stored as ``(in, out)``), a quantized layer, or
    any module that maps ``(..., in)`` to ``(..., out)``. A plain one is multiplied in one fused
    operation; any other is called, with its hooks, and the update is added. The output has the base's
    dtype. `weight` is for code that reads a weight instead of calling its layer, or asks it for its dtype.

    Args:
        base: the layer to adapt; it stays as it is and should not require grad.
        adapters: one or more, on rows that do not overlap.
        in_features, out_features: the base's shape.
        dropout: on the adapters' input, in training.
        transposed: the base keeps its weight as ``(in, out)``; by default only a Conv1D does.
    """

    is_layer = True  # messages about its parameters name it as a whole

    def __init__(
        self,
        base: nn.Module,
        adapters: Iterable[Adapter],
        *,
        in_features: int,
        out_features: int,
        dropout: float = 0.0,
        transposed: bool | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList(adapters)
        self.in_features, self.out_features = in_features, out_features
        self.dropout = dropout
        self.transposed = hasattr(base, "nf") if transposed is None else transposed
        self.enabled = True
        self.called = self.read = False  # while enabled, ever; not by compiled code: see `seen_by_compiler`
        self.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base makes of its arguments, of which the first is x, plus the updates."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        self._note("called")
        x = args[0] if args else next(iter(kwargs.values()))
        blocks = [adapter.block for adapter in self._held()]
        dropout = self.dropout if self.training else 0.0
        weight = plain_weight(self.base)
        if weight is None:
            y = self.base(*args, **kwargs)  # which may take x to another device
            if self.training and x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
                raise RuntimeError(
                    f"{type(self.base).__name__} passes no gradient to its input, so the layers below it "
                    "would be trained wrongly. bitsandbytes does so once a 4-bit layer has run in evaluation "
                    "mode on some CPUs: set support_avx512bf16_for_cpu = False on these layers before"
                )
            return add_lora(y, x.to(y.device), blocks, dropout=dropout)
        return fused_lora(x, weight, self.bias, blocks, dropout=dropout)

    def _held(self) -> list[Adapter]:
        return cast("list[Adapter]", list(self.adapters))

    @property
    def weight(self) -> Tensor:
        """W + ΔW for whatever computes with it, in the base's dtype and layout; see `ReadWeight`.

        Dropout does not act in it. It is the base's own parameter while the adapters are disabled, and where
        ΔW cannot be added to that: packed, sharded, or on the meta device.
        """
        weight = cast(Tensor, self.base.weight)
        if not self.enabled or not readable(weight) or weight.dim() != 2:
            return weight
        if (weight.t() if self.transposed else weight).shape != (self.out_features, self.in_features):
            return weight
        return read_weight(weight, self._held(), transposed=self.transposed, used=partial(self._note, "read"))

    @property
    def used(self) -> bool:
        """Was it ever called, or its weight used in an operation, while its adapters were enabled?"""
        return self.called or self.read

    def _note(self, what: str) -> None:
        if torch.compiler.is_compiling():
            _note_compiler()
        else:
            self.__dict__[what] = True  # __setattr__ of a module takes ten times as long

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """The rank of the update: the sum over its row blocks."""
        return sum(adapter.rank for adapter in self._held())

    @property
    def scaling(self) -> float:
        """The factor of B·A; raises ValueError where the row blocks have several."""
        scalings = sorted({adapter.scaling for adapter in self._held()})
        if len(scalings) > 1:
            raise ValueError(f"the row blocks have scalings of their own: {scalings}; see .adapters")
        return scalings[0]

    def delta_weight(self) -> Tensor:
        """``ΔW`` (out, in), detached, in fp32 (fp64 for fp64 adapters): what is added to the weight."""
        return full_delta(self._held(), self.out_features)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        move_below_base(state_dict, prefix, ("base.", "adapters."))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dropout={self.dropout}"


_compiled = False


def _note_compiler() -> None:
    """Runs while the compiler traces a layer, and is no part of what it compiles."""
    global _compiled
    _compiled = True


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler here.
_note_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]


def seen_by_compiler() -> bool:
    """Has the compiler traced a layer in this process? Compiled code keeps no record in a layer."""
    return _compiled


def plain_weight(base: nn.Module) -> Tensor | None:
    """The weight ``(out, in)`` of a base that the fused product may read, else None.

    Plain means: nothing but ``x·Wᵀ + b`` happens when it is called. Subclasses, hooks, parametrizations,
    replaced forwards and tensor subclasses (quantized, distributed) keep their own call.
    """
    parameters = base._parameters
    weight = parameters.get("weight")
    if (
        weight is None
        or type(weight) not in (nn.Parameter, Tensor)
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
