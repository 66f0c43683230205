"""Adapts a tensor where it is read: for weights that no Linear holds, or that are read without a call.

The module keeps its place, its parameters and their names; its class is exchanged for a subclass on which the
adapted name reads as W + ΔW. Unlike `torch.nn.utils.parametrize` the subclass is never changed afterwards, so
copies do not depend on each other, and it pickles. For `nn.MultiheadAttention` the price is a full ΔW
(out, in) for each forward; a tensor of experts adapts the products with it: see `experts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter, RowBlocks, full_delta, updates
from lowrank.layers.expert_stack import ExpertStacks, Layout
from lowrank.layers.experts import adapted_experts
from lowrank.layers.functional import Block
from lowrank.linalg.precision import without_autocast

ADAPTERS = "lora"  # the child module that holds them, in state dicts too


class WeightAdapters(nn.ModuleDict):
    """The adapters of one module's tensors: by adapter name, then by parameter name."""

    def __init__(self, acting: Acting) -> None:
        super().__init__()
        self._acting = acting

    def put(
        self,
        name: str,
        adapters: Mapping[str, Iterable[Adapter]],
        layouts: Mapping[str, Layout],
    ) -> None:
        """Hangs up what ``name`` does, by parameter; those with a layout are tensors of experts."""
        self[name] = nn.ModuleDict(
            {
                param: ExpertStacks(each, layouts[param]) if param in layouts else RowBlocks(each)
                for param, each in adapters.items()
            }
        )

    def params(self) -> tuple[str, ...]:
        """The parameters that any adapter changes."""
        return tuple(dict.fromkeys(param for held in self._modules.values() for param in cast(Any, held)))

    def of(self, name: str, param: str) -> list[Adapter]:
        """The adapters of ``name`` on ``param``; none where it does not change that."""
        held = cast(nn.ModuleDict, self[name])._modules
        return cast("RowBlocks | ExpertStacks", held[param]).held() if param in held else []

    def acting(self, param: str) -> list[tuple[Any, Tensor | None]]:
        """What acts on ``param`` now, `RowBlocks` or `ExpertStacks`, each with the factor of its ΔW."""
        found = self._acting.among(cast("dict[str, nn.ModuleDict]", self._modules))
        return [(held._modules[param], weight) for held, weight in found if param in held._modules]


class AdaptedWeight:
    """Marks a module whose parameters, or some of them, read as W + ΔW. See `adapt_weights`."""

    lora: WeightAdapters
    is_layer = True  # messages about its parameters name it as a whole

    @property
    def why_idle(self) -> str:
        """What a message says of parameters here that got no gradient; see `Acting.why_idle`."""
        return self.lora._acting.why_idle(self.lora._modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, in which each adapted tensor is computed once however often it is read."""
        self.__dict__["_adapted"] = {}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__.pop("_adapted", None)

    def delta_weight(self, param: str | None = None, name: str | None = None) -> Tensor:
        """``ΔW`` (rows, in) in fp32, detached, of ``param`` by the adapter ``name``, its weight left aside.

        Both may be left out where there is only one.
        """
        (name,) = [name] if name else self.lora.keys()
        (param,) = [param] if param else cast(nn.ModuleDict, self.lora[name]).keys()
        weight, part = self._parameters[param], cast(Any, self.lora[name])[param]  # type: ignore[attr-defined]
        if isinstance(part, ExpertStacks):
            return full_delta(part.blocks(), part.height)
        rows = weight.numel() // weight.shape[-1]
        return full_delta([adapter.block for adapter in part.held()], rows)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (original_class(self), self.lora.params()), self.__dict__


def adapt_weights(module: nn.Module, adapters: WeightAdapters) -> None:
    """From now on each parameter of ``module`` that ``adapters`` name reads as itself plus their update."""
    module.add_module(ADAPTERS, adapters.train(module.training))
    original: Any = type(module)
    module.__class__ = _adapted_class(original, adapters.params())


def release_weights(module: Any) -> WeightAdapters:
    """Undoes `adapt_weights`: the class and the parameters are the original ones. Returns the adapters."""
    adapters = module._modules.pop(ADAPTERS)
    module.__class__ = original_class(module)
    return adapters


def original_class(module: AdaptedWeight) -> Any:
    return type(module).__mro__[2]


def effective_weight(weight: Tensor, blocks: Sequence[Block]) -> Tensor:
    """W + ΔW, added in fp32, in W's dtype and shape, differentiable; a zero ΔW gives W's own values."""
    rows = weight.reshape(-1, weight.shape[-1])
    parts, done = [], 0
    for start, stop, update in updates(blocks):
        if start > done:
            parts.append(rows[done:start])
        parts.append((rows[start:stop].to(update.dtype) + update).to(weight.dtype))
        done = stop
    if done < len(rows):
        parts.append(rows[done:])
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(weight.shape)


def _simple(weight: Tensor, blocks: Sequence[Block]) -> bool:
    """Are W, the factors and the sum of one dtype, and the blocks' rows one after the other in W?"""
    plain = all(block.A.dtype == weight.dtype and block.A0 is None for block in blocks)
    spans = [block.rows for block in blocks]
    apart = all(len(rows) == 2 for rows in spans) and all(a[1] <= b[0] for a, b in pairwise(spans))
    return plain and apart and weight.dim() == 2 and weight.is_contiguous()


def _added(rows: Tensor, blocks: Sequence[Block]) -> Tensor:
    """W + ΔW where the factors have W's dtype: one product that starts from W, without ΔW beside it."""
    parts, done = [], 0
    with without_autocast(rows):
        for (start, stop), A, B, scaling, _, _ in blocks:
            parts += [rows[done:start]] if start > done else []
            parts.append(torch.addmm(rows[start:stop], B, A, alpha=scaling))
            done = stop
    parts += [rows[done:]] if done < len(rows) else []
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def elsewhere(weight: Tensor, adapters: nn.Module) -> bool:
    """Is ``weight`` on the meta device and an adapter is not? It is loaded later then, or for each call."""
    return weight.is_meta and not all(each.is_meta for each in adapters.parameters())


def _read(module: Any, param: str) -> Tensor:
    # A replica of nn.DataParallel has a plain attribute in its place.
    weight = module._parameters[param] if param in module._parameters else module.__dict__[param]
    parts = [] if elsewhere(weight, module.lora) else module.lora.acting(param)
    if not parts:
        return weight
    cache = module.__dict__.get("_adapted", {})
    if param not in cache:
        if isinstance(parts[0][0], ExpertStacks):
            cache[param] = adapted_experts(weight, parts)
        else:
            blocks = [block for part, factor in parts for block in part.blocks(factor)]
            made = _added if _simple(weight, blocks) else effective_weight
            cache[param] = made(weight, blocks)
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
