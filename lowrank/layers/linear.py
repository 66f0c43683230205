"""`LoRALinear`: a frozen linear layer with its low-rank updates beside it.

It runs any Linear-like base and never writes to it. The product itself is in `functional`, the parameters
are in `adapter`; it knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter, RowBlocks, full_delta
from lowrank.layers.bases import plain_weight
from lowrank.layers.block import Block
from lowrank.layers.copied import MergedWeight
from lowrank.layers.functional import add_lora, fused_lora, to_autocast, transformed
from lowrank.layers.grouped import ExampleAdapters, add_grouped
from lowrank.layers.inference import Kept, infer
from lowrank.layers.layer import AdaptedLayer, note_compiler
from lowrank.layers.magnitude import excess_of, multiplied_by, rescaled, row_norms
from lowrank.layers.offsets import TokenOffsets
from lowrank.layers.reading import AS_STORED, TRANSPOSED, Layout
from lowrank.layers.ready import Ready
from lowrank.linalg.rows import take


class LoRALinear(AdaptedLayer):
    """``y = base(x) + Σ scaling · x·Aᵀ·Bᵀ``, the sum over what acts, each term on its own rows of the output.

    The base may be an ``nn.Linear``, a Conv1D (weight stored as ``(in, out)``), a quantized layer, or
    any module that maps ``(..., in)`` to ``(..., out)``. A plain one is multiplied in one fused
    operation; any other is called, with its hooks, and the update is added. The output has the base's
    dtype. `weight` is for code that reads a weight instead of calling its layer, or asks it for its dtype.

    Args:
        base: the layer to adapt; it stays as it is and should not require grad.
        adapters: of the first name, on rows that do not overlap. `put` adds others.
        in_features, out_features: the base's shape.
        dropout: on the input of these adapters, in training.
        name: of these adapters.
        acting: which names act, shared with other layers; by default ``name`` does.
        transposed: the base keeps its weight as ``(in, out)``; by default only a Conv1D does.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: Iterable[Adapter] = (),
        *,
        in_features: int,
        out_features: int,
        dropout: float = 0.0,
        name: str = "default",
        acting: Acting | None = None,
        transposed: bool | None = None,
    ) -> None:
        super().__init__(base, in_features=in_features, out_features=out_features, name=name, acting=acting)
        self.transposed = hasattr(base, "nf") if transposed is None else transposed
        self.ready, self.kept, self.copied = Ready(), Kept(), MergedWeight()
        self.register_load_state_dict_post_hook(_follow_base)
        first = list(adapters)
        if first:
            self.put(name, first, dropout)

    @property
    def layout(self) -> Layout:
        return TRANSPOSED if self.transposed else AS_STORED

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.__dict__["_base_came"] = f"{prefix}base.weight" in state_dict

    def train(self, mode: bool = True) -> Self:
        """Also drops what a call without a graph has kept: writing through ``.data`` leaves no trace."""
        if "kept" in self.__dict__:
            self.kept.drop()
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base makes of its arguments, of which the first is x, plus the updates."""
        if self.copied.on and len(args) == 1 and not kwargs:
            y = self._merged(args[0])
            if y is not None:
                return y
        if not (torch.compiler.is_compiling() or kwargs):
            y = self._usual(*args)
            if y is not None:
                return y
        if self.acting.rows is not None:
            return self._by_rows(self.acting.rows, *args, **kwargs)
        products, tokens = self._products("called")
        if not products and not tokens:
            return self.base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        base = cast(nn.Module, self._modules["base"])  # a module's __getattr__ takes ten times as long
        weight = plain_weight(base) if products else None
        if weight is None:
            y = base(*args, **kwargs)  # which may take x to another device
            if self.training and x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
                raise RuntimeError(
                    f"{type(self.base).__name__} passes no gradient to its input, so the layers below it "
                    "would be trained wrongly. bitsandbytes does so once a 4-bit layer has run in evaluation "
                    "mode on some CPUs: set support_avx512bf16_for_cpu = False on these layers before"
                )
            x = x.to(y.device)
        else:
            blocks, dropout = products.pop(0)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.kept.drop()
                self.copied.stale = True
            y = fused_lora(x, weight, base._parameters["bias"], blocks, dropout=dropout, kept=self.kept)
        for blocks, dropout in products:
            y = add_lora(y, x, blocks, dropout=dropout)
        for part, _ in self.acting.among(self._parts()):
            if part.rescales:
                y = rescaled(y, self.bias, self._excess(part, weight, y.dtype))
        for offsets, factor in tokens:
            y = offsets.multiplied(y, x, factor)
        return y

    def _merged(self, x: Tensor) -> Tensor | None:
        """The output by the copy that `lowrank.merged` keeps; None where this call needs the factors."""
        if torch.is_grad_enabled() or transformed():
            return None
        if self.training and any(part.dropout for part, _ in self.acting.among(self._parts())):
            return None
        base = cast(nn.Module, self._modules["base"])
        weight = plain_weight(base)
        if weight is None:
            return None
        if torch.compiler.is_compiling():
            note_compiler()
            merged = self.copied.as_made(self.acting, weight)
        else:
            merged = self.copied.current(self, weight)
        return None if merged is None else F.linear(x, merged, base._parameters["bias"])

    def _usual(self, x: Tensor, *rest: Any) -> Tensor | None:
        """The output of the usual case, a plain base and blocks without dropout or weights; else None."""
        acting, modules = self.acting, self._modules  # a module's __getattr__ takes ten times as long
        base: Any = modules["base"]
        weight = plain_weight(base)
        if weight is None or rest or acting.rows is not None or transformed():
            return None
        graph = torch.is_grad_enabled()
        if graph and acting.weights:  # whose values are for the product to read
            return None
        blocks = self.ready.blocks(acting, modules["adapters"]._modules)  # type: ignore[arg-type, union-attr]
        if not blocks or (self.training and self.ready.dropout):
            return None
        bias = base._parameters["bias"]
        if graph:
            self.kept.drop()
            self.copied.stale = True
            return fused_lora(x, weight, bias, blocks)
        if torch._C._is_any_autocast_enabled():
            x, weight, bias = to_autocast(x, weight, bias)
        return infer(x, weight, bias, blocks, self.kept)

    def _excess(self, part: RowBlocks, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """By how much the magnitudes of ``part`` scale each column of the output, less 1, (out,)."""
        return excess_of(part.held(), multiplied_by(self.base, weight, dtype), self.out_features)

    def _by_rows(self, rows: ExampleAdapters, *args: Any, **kwargs: Any) -> Tensor:
        y, parts = self.base(*args, **kwargs), self._parts()
        used = rows.used(parts)
        if not used:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        rows.check(x, self)
        for name in used:
            parts[name].note("called")
        return add_grouped(y, x, self, parts, rows, training=self.training)

    def _products(
        self, use: str
    ) -> tuple[list[tuple[list[Block], float]], list[tuple[TokenOffsets, Tensor | None]]]:
        """The blocks that act, those with one dropout together; it is noted that they are ``use``d.

        And the rows that train apart, each with its weight; None is 1.
        """
        products: list[tuple[list[Block], float]] = []
        tokens: list[tuple[TokenOffsets, Tensor | None]] = []
        compiling = torch.compiler.is_compiling()
        if compiling:
            note_compiler()
        for part, weight in self.acting.among(self._parts()):
            if not compiling:
                part.note(use)
            if part.tokens is not None:
                tokens.append((part.tokens, weight))
                if len(part) == 1:  # nothing else
                    continue
            dropout = part.dropout if self.training else 0.0
            if products and products[-1][1] == dropout:
                products[-1][0].extend(part.blocks(weight))
            else:
                products.append((part.blocks(weight), dropout))
        return products, tokens

    def delta_weight(self, name: str | None = None) -> Tensor:
        """See `AdaptedLayer.delta_weight`; magnitudes count in it.

        Raises ValueError where there are some and the base's weight cannot be read.
        """
        part = self.part(name)
        if not part.rescales:
            return super().delta_weight(name)
        weight = plain_weight(self.base)
        if weight is None:
            raise ValueError(f"the weight of a {type(self.base).__name__} cannot be read here")
        delta = full_delta(part.blocks(), self.out_features)
        delta = delta + self.excess(part)[:, None] * (weight.detach().to(delta.dtype) + delta)
        if part.tokens is not None:  # the magnitudes do not act on these
            delta.index_add_(0, part.tokens.index, part.tokens.offsets.detach().to(delta.dtype))
        return delta

    @torch.no_grad()
    def excess(self, part: RowBlocks) -> Tensor:
        """By how much each row of W + ΔW is scaled, less 1, (out,), detached: zero without magnitudes."""
        A = part.held()[0].A
        if not part.rescales:
            return A.new_zeros(self.out_features)
        stored = cast(Tensor, self.base.weight)
        dtype = stored.dtype if stored.is_floating_point() and stored.itemsize > 1 else A.dtype
        return self._excess(part, plain_weight(self.base), dtype)


def _follow_base(layer: LoRALinear, *_: Any) -> None:
    """Tells the magnitudes in ``layer`` of a weight that it has just loaded.

    Those of an adapter that changes nothing yet start from that weight.
    """
    weight = plain_weight(layer.base) if layer.__dict__.pop("_base_came", False) else None
    if weight is None or weight.is_meta:
        return
    for part in layer._parts().values():
        for adapter in part.held():
            if adapter.magnitude is not None:
                norms = row_norms(take(weight, adapter.rows))
                adapter.magnitude.follow(norms, start=not adapter.moved())
