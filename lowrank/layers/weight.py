"""Adapts a tensor on the weight itself: for weights that no Linear holds, or that are read without a call.

`nn.MultiheadAttention` and stacks of experts are such. The module keeps its place, its parameters and
their names; its class is exchanged for a subclass on which the adapted name reads as W + ΔW. Unlike
`torch.nn.utils.parametrize` the subclass is never changed afterwards, so copies do not depend on each
other, and it pickles. The price is a full ΔW (out, in) for each forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.layers.adapter import Adapter, full_delta
from lowrank.linalg.rows import pieces

ADAPTERS = "lora"  # the child module that holds them, in state dicts too


class WeightAdapters(nn.ModuleDict):
    """The adapters of one module's tensors, by parameter name."""

    enabled = True

    def of(self, param: str) -> list[Adapter]:
        return cast("list[Adapter]", list(cast(nn.ModuleList, self[param])))


class AdaptedWeight:
    """Marks a module whose parameters, or some of them, read as W + ΔW. See `adapt_weights`."""

    lora: WeightAdapters
    is_layer = True  # messages about its parameters name it as a whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, in which each adapted tensor is computed once however often it is read."""
        self.__dict__["_adapted"] = {}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__.pop("_adapted", None)

    def delta_weight(self, param: str | None = None) -> Tensor:
        """``ΔW`` (rows, in) in fp32, detached, of ``param`` (the only adapted one where it is not said)."""
        (name,) = [param] if param else self.lora.keys()
        weight = self._parameters[name]  # type: ignore[attr-defined]
        return full_delta(self.lora.of(name), weight.numel() // weight.shape[-1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (type(self).__mro__[2], tuple(self.lora)), self.__dict__


def adapt_weights(module: nn.Module, adapters: Mapping[str, Sequence[Adapter]]) -> None:
    """From now on each named parameter of ``module`` reads as itself plus its adapters' update."""
    made = WeightAdapters({param: nn.ModuleList(each) for param, each in adapters.items()})
    module.add_module(ADAPTERS, made.train(module.training))
    original: Any = type(module)
    module.__class__ = _adapted_class(original, tuple(adapters))


def release_weights(module: Any) -> None:
    """Undoes `adapt_weights`: the class and the parameters are the original ones."""
    del module._modules[ADAPTERS]
    module.__class__ = type(module).__mro__[2]


def effective_weight(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W + ΔW, added in fp32, in W's dtype and shape, differentiable; a zero ΔW gives W's own values."""
    rows = weight.reshape(-1, weight.shape[-1])
    updates: list[tuple[tuple[int, int], Tensor]] = []
    for adapter in adapters:
        blocks = pieces(adapter.rows)
        updates += zip(blocks, adapter.product().chunk(len(blocks)), strict=True)
    parts, done = [], 0
    for (start, stop), update in sorted(updates, key=lambda each: each[0]):
        if start > done:
            parts.append(rows[done:start])
        parts.append((rows[start:stop].to(update.dtype) + update).to(weight.dtype))
        done = stop
    if done < len(rows):
        parts.append(rows[done:])
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(weight.shape)


def _read(module: Any, param: str) -> Tensor:
    # A replica of nn.DataParallel has a plain attribute in its place.
    weight = module._parameters[param] if param in module._parameters else module.__dict__[param]
    if not module.lora.enabled or weight.is_meta:
        return weight
    cache = module.__dict__.get("_adapted")
    if cache is None:
        return effective_weight(weight, module.lora.of(param))
    if param not in cache:
        cache[param] = effective_weight(weight, module.lora.of(param))
    return cache[param]


@cache
def _adapted_class(original: type, params: tuple[str, ...]) -> type:
    def reader(param: str) -> property:
        return property(
            lambda self: _read(self, param), lambda self, value: self.__dict__.__setitem__(param, value)
        )

    members = {param: reader(param) for param in params}
    return type(f"LoRA{original.__name__}", (AdaptedWeight, original), members)


def _restore(original: Any, params: tuple[str, ...]) -> nn.Module:
    cls: Any = _adapted_class(original, params)
    return cls.__new__(cls)
