"""`LoRALinear`: a frozen linear layer with its low-rank updates beside it.

It runs any Linear-like base and never writes to it. The product itself is in `functional`, the parameters
are in `adapter`; it knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter, RowBlocks, full_delta
from lowrank.layers.bases import plain_weight
from lowrank.layers.functional import Block, add_lora, fused_lora
from lowrank.layers.grouped import ExampleAdapters, add_grouped
from lowrank.layers.loading import move_below_base
from lowrank.layers.magnitude import excess_of, multiplied_by, rescaled
from lowrank.layers.reading import read_weight, readable


class LoRALinear(nn.Module):
    """``y = base(x) + Σ scaling · x·Aᵀ·Bᵀ``, the sum over what acts, each term on its own rows of the output.

    The base may be an ``nn.Linear``, a Conv1D (weight stored as ``(in, out)``), a quantized layer, or
    any module that maps ``(..., in)`` to ``(..., out)``. A plain one is multiplied in one fused
    operation; any other is called, with its hooks, and the update is added. The output has the base's
    dtype. `weight` is for code that reads a weight instead of calling its layer, or asks it for its dtype.

    Args:
        base: the layer to adapt; it stays as it is and should not require grad.
        adapters: of the first name, on rows that do not overlap. `put` hangs others beside them.
        in_features, out_features: the base's shape.
        dropout: on the input of these adapters, in training.
        name: of these adapters.
        acting: which names act, shared with other layers; by default ``name`` does.
        transposed: the base keeps its weight as ``(in, out)``; by default only a Conv1D does.
    """

    is_layer = True  # messages about its parameters name it as a whole

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
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()  # name → RowBlocks
        self.in_features, self.out_features = in_features, out_features
        self.transposed = hasattr(base, "nf") if transposed is None else transposed
        self.acting = Acting((name,)) if acting is None else acting
        first = list(adapters)
        if first:
            self.put(name, first, dropout)
        self.train(base.training)

    def put(self, name: str, adapters: Iterable[Adapter], dropout: float = 0.0) -> None:
        """Hangs up the adapters of ``name``, on rows that do not overlap."""
        self.adapters[name] = RowBlocks(adapters, dropout).train(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base makes of its arguments, of which the first is x, plus the updates."""
        if self.acting.rows is not None:
            return self._by_rows(self.acting.rows, *args, **kwargs)
        products = self._products("called")
        if not products:
            return self.base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        weight = plain_weight(self.base)
        if weight is None:
            y = self.base(*args, **kwargs)  # which may take x to another device
            if self.training and x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
                raise RuntimeError(
                    f"{type(self.base).__name__} passes no gradient to its input, so the layers below it "
                    "would be trained wrongly. bitsandbytes does so once a 4-bit layer has run in evaluation "
                    "mode on some CPUs: set support_avx512bf16_for_cpu = False on these layers before"
                )
            x = x.to(y.device)
        else:
            blocks, dropout = products.pop(0)
            y = fused_lora(x, weight, self.bias, blocks, dropout=dropout)
        for blocks, dropout in products:
            y = add_lora(y, x, blocks, dropout=dropout)
        for part, _ in self.acting.among(self._parts()):
            if part.rescales:
                y = rescaled(y, self.bias, self._excess(part, weight, y.dtype))
        return y

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

    def _products(self, use: str) -> list[tuple[list[Block], float]]:
        """The blocks that act, those with one dropout together; it is noted that they are ``use``d."""
        products: list[tuple[list[Block], float]] = []
        compiling = torch.compiler.is_compiling()
        if compiling:
            _note_compiler()
        for part, weight in self.acting.among(self._parts()):
            if not compiling:
                part.note(use)
            dropout = part.dropout if self.training else 0.0
            if products and products[-1][1] == dropout:
                products[-1][0].extend(part.blocks(weight))
            else:
                products.append((part.blocks(weight), dropout))
        return products

    def _parts(self) -> dict[str, RowBlocks]:
        return cast("dict[str, RowBlocks]", self.adapters._modules)

    @property
    def weight(self) -> Tensor:
        """W + ΔW for whatever computes with it, in the base's dtype and layout; see `ReadWeight`.

        Dropout does not act in it. It is the base's own parameter while no adapter acts, and where ΔW cannot
        be added to that: packed, sharded, or on the meta device.
        """
        weight = cast(Tensor, self.base.weight)
        acting = list(self.acting.among(self._parts()))
        rows = self.acting.rows
        if rows is not None:
            acting = [(part, None) for name, part in self._parts().items() if name in rows.names]
        if not acting or not readable(weight) or weight.dim() != 2:
            return weight
        if (weight.t() if self.transposed else weight).shape != (self.out_features, self.in_features):
            return weight
        blocks = [block for part, factor in acting for block in part.blocks(factor)]

        def used() -> None:
            if rows is not None:
                raise ValueError(
                    f"{rows.path(self)}: its weight is read without a call, so adapters for single examples "
                    "cannot act on it: run the examples of one adapter at a time, with use_adapters"
                )
            if any(part.rescales for part, _ in acting):
                raise ValueError(
                    "the weight of a layer is read without a call, where the magnitudes of dora=True have no "
                    f"effect: leave it out with exclude=, or adapt it without dora ({self.base})"
                )
            if torch.compiler.is_compiling():
                _note_compiler()
            else:
                for part, _ in acting:
                    part.note("read")

        return read_weight(weight, blocks, transposed=self.transposed, used=used)

    def part(self, name: str | None = None) -> RowBlocks:
        """The adapters of ``name``, which may be left out where there is one; else raises ValueError."""
        parts = self._parts()
        if name is None and len(parts) == 1:
            return next(iter(parts.values()))
        if name not in parts:
            raise ValueError(f"expected the name of an adapter of this layer, of {list(parts)}, got {name!r}")
        return parts[name]

    @property
    def used(self) -> bool:
        """Was it ever called, or its weight used in an operation, while adapters acted?"""
        return any(part.used for part in self._parts().values())

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """The rank of the only adapter's update: the sum over its row blocks."""
        return sum(adapter.rank for adapter in self.part().held())

    @property
    def scaling(self) -> float:
        """The factor of B·A of the only adapter; raises ValueError where its row blocks have several."""
        scalings = sorted({adapter.scaling for adapter in self.part().held()})
        if len(scalings) > 1:
            raise ValueError(f"the row blocks have scalings of their own: {scalings}; see .adapters")
        return scalings[0]

    def delta_weight(self, name: str | None = None) -> Tensor:
        """``ΔW`` (out, in), detached, in fp32 (fp64 for fp64 adapters): what is added to the weight.

        That of the adapter ``name``, which may be left out where there is one. Its weight in a mixture is
        not applied, and it need not act. Raises ValueError where it has magnitudes and the base's weight
        cannot be read.
        """
        part = self.part(name)
        delta, weight = full_delta(part.blocks(), self.out_features), plain_weight(self.base)
        if not part.rescales:
            return delta
        if weight is None:
            raise ValueError(f"the weight of a {type(self.base).__name__} cannot be read here")
        return delta + self.excess(part)[:, None] * (weight.detach().to(delta.dtype) + delta)

    @torch.no_grad()
    def excess(self, part: RowBlocks) -> Tensor:
        """By how much each row of W + ΔW is scaled, less 1, (out,), detached: zero without magnitudes."""
        A = part.held()[0].A
        if not part.rescales:
            return A.new_zeros(self.out_features)
        stored = cast(Tensor, self.base.weight)
        dtype = stored.dtype if stored.is_floating_point() and stored.itemsize > 1 else A.dtype
        return self._excess(part, plain_weight(self.base), dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        move_below_base(state_dict, prefix, ("base.", "adapters."))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


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
