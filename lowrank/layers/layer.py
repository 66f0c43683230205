"""What every adapted layer is: the base with its adapters by name. Each kind says what it computes.

It never writes to the base, and knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter, RowBlocks, full_delta, weighted
from lowrank.layers.functional import Block
from lowrank.layers.loading import move_below_base
from lowrank.layers.offsets import TokenOffsets
from lowrank.layers.reading import AS_STORED, TRANSPOSED, Layout, in_forward, read_weight, readable
from lowrank.layers.weight import elsewhere


class AdaptedLayer(nn.Module):
    """Takes the place of ``base`` and holds what was put beside it.

    Args:
        base: the layer to adapt; it stays as it is and should not require grad.
        in_features, out_features: the shape of its weight as a matrix.
        acting: which names act, shared with other layers; by default ``name`` does.
    """

    is_layer = True  # messages about its parameters name it as a whole

    def __init__(
        self,
        base: nn.Module,
        *,
        in_features: int,
        out_features: int,
        name: str = "default",
        acting: Acting | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()  # name → RowBlocks
        self.in_features, self.out_features = in_features, out_features
        self.acting = Acting((name,)) if acting is None else acting
        self.train(base.training)

    def put(
        self,
        name: str,
        adapters: Iterable[Adapter],
        dropout: float = 0.0,
        tokens: TokenOffsets | None = None,
    ) -> None:
        """Hangs up the adapters of ``name``, on rows that do not overlap, and the rows that train apart."""
        self.adapters[name] = RowBlocks(adapters, dropout, tokens).train(self.training)

    def _acting(self) -> list[tuple[RowBlocks, Tensor | None]]:
        """What acts in a call, each with its weight; it is noted that it is called."""
        acting = list(self.acting.among(self._parts()))
        if torch.compiler.is_compiling():
            note_compiler()
        else:
            for part, _ in acting:
                part.note("called")
        return acting

    def _parts(self) -> dict[str, RowBlocks]:
        return cast("dict[str, RowBlocks]", self.adapters._modules)

    @property
    def why_idle(self) -> str:
        """What a message says of parameters here that got no gradient; see `Acting.why_idle`."""
        return self.acting.why_idle(self._parts())

    @property
    def layout(self) -> Layout:
        """How the base stores the matrix ``(out, in)``."""
        return AS_STORED

    @property
    def weight(self) -> Tensor:
        """W + ΔW for whatever computes with it, in the base's dtype and layout; see `ReadWeight`.

        Dropout does not act in it. It is the base's own parameter while no adapter acts, and where ΔW cannot
        be added to that: packed, sharded, or on the meta device without the adapters.
        """
        weight = cast(Tensor, self.base.weight)
        acting = list(self.acting.among(self._parts()))
        rows = self.acting.rows
        if rows is not None:
            acting = [(part, None) for name, part in self._parts().items() if name in rows.names]
        if not acting or not readable(weight) or weight.dim() < 2 or elsewhere(weight, self.adapters):
            return weight
        if self.layout.rows(weight).shape != (self.out_features, self.in_features):
            return weight
        blocks = [block for part, factor in acting for block in self._blocks(part, factor)]

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
                note_compiler()
            else:
                for part, _ in acting:
                    part.note("read")
                    if not part.read_in_forward and in_forward():
                        part.note("read_in_forward")

        return read_weight(weight, blocks, layout=self.layout, used=used)

    def _blocks(self, part: RowBlocks, factor: Tensor | None = None) -> list[Block]:
        """All that ``part`` adds to the weight, as products; ΔW is multiplied by ``factor``."""
        blocks = part.blocks(factor)
        if part.tokens is not None:
            shape = self.out_features, self.in_features
            blocks.append(weighted(part.tokens.block(shape, transposed=self.layout is TRANSPOSED), factor))
        return blocks

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
        """The factor of B·A of the only adapter; ValueError where its row blocks have none, or several."""
        scalings = sorted({adapter.scaling for adapter in self.part().held()})
        if len(scalings) != 1:
            raise ValueError(f"the row blocks have scalings of their own: {scalings}; see .adapters")
        return scalings[0]

    def delta_weight(self, name: str | None = None) -> Tensor:
        """``ΔW`` (out, in), detached, in fp32 (fp64 for fp64 adapters): what is added to the weight.

        That of the adapter ``name``, which may be left out where there is one. Its weight in a mixture is
        not applied, and it need not act.
        """
        return full_delta(self._blocks(self.part(name)), self.out_features)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        move_below_base(state_dict, prefix, ("base.", "adapters."))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class StandIn(AdaptedLayer):
    """Answers for its base: what it does not define itself, such as ``padding_idx``, is looked up there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}):
                raise  # still being built or unpickled
            return getattr(self.base, name)

    def _refuse_rows(self) -> None:
        """Raises ValueError where examples have adapters of their own, and one of them is held here."""
        rows = self.acting.rows
        if rows is not None and rows.used(self._parts()):
            raise ValueError(
                f"{rows.path(self)}: {type(self.base).__name__} cannot have an adapter for each example: run "
                "the examples of one adapter at a time, with use_adapters"
            )


_compiled = False


def note_compiler() -> None:
    """Runs while the compiler traces a layer, and is no part of what it compiles."""
    global _compiled
    _compiled = True


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler here.
note_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]


def seen_by_compiler() -> bool:
    """Has the compiler traced a layer in this process? Compiled code keeps no record in a layer."""
    return _compiled
