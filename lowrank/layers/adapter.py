"""One low-rank update of some rows of one weight: its parameters and what they add up to.

It does not know the layer that it sits in, nor multiply any activation: that is `functional`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.layers.functional import Block
from lowrank.layers.magnitude import Magnitude
from lowrank.layers.offsets import TokenOffsets
from lowrank.linalg.precision import without_autocast
from lowrank.linalg.rows import Rows, add_, height, pieces


class Adapter(nn.Module):
    """``ΔW = scaling · B·A`` on some output rows of a weight ``(out, in)``.

    A start with B·A ≠ 0 is an anchor: the start ``(A0, B0)`` is kept beside the parameters ``A`` and
    ``B``, which then hold the offsets from it, zero at first:
    ``ΔW = scaling · (B·(A0 + A) + B0·A)``. That trains as W − scaling·B0·A0 in place of W would (same
    gradients), while W is never written, and zero offsets add exact zeros.

    Args:
        A: (rank, in), the start.
        B: (rows, rank), the start.
        scaling: the factor of B·A.
        rows: the output rows that it updates, ``(start, stop)`` or pieces of that: see `linalg.rows`.
        frozen: of {"A", "B"}: what is not trained. It is kept: `requires_grad` may say otherwise for a while,
            as in a model that is frozen for inference.
        dtype: of the parameters; fp32 also on a half-precision base.

    Raises:
        ValueError: the shapes do not fit, nothing is trained, or a factor is not finite.
    """

    A0: Tensor | None
    B0: Tensor | None
    magnitude: Magnitude | None  # DoRA: the rows' magnitudes are trained apart

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        rows: Rows,
        frozen: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        rank = A.shape[0]
        if A.dim() != 2 or B.shape != (height(rows), rank):
            raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit rows {rows}")
        if set(frozen) - {"A", "B"} or {"A", "B"} <= set(frozen):
            raise ValueError(f'expected at most one of "A" and "B" as frozen, got {sorted(frozen)}')
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError("the initializer made factors that are not finite")
        A, B = (factor.detach().to(dtype).contiguous().clone() for factor in (A, B))
        anchored = bool(A.any() and B.any())  # else B·A is zero at first
        if "B" in frozen and not B.any():
            raise ValueError("a frozen B must not be zero")
        if anchored and "A" in frozen:
            # B·A − B0·A is (B − B0)·A: with A fixed the offset alone is an ordinary adapter.
            B, anchored = torch.zeros_like(B), False
        self.rank, self.scaling, self.rows = rank, float(scaling), rows
        if anchored:
            self._hold(torch.zeros_like(A), torch.zeros_like(B), A, B, frozen)
        else:
            self._hold(A, B, None, None, frozen)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        scaling: float,
        *,
        rows: Rows,
        frozen: Collection[str] = (),
    ) -> Adapter:
        """The adapter whose ``state_dict()`` was ``state``, bit for bit."""
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter._hold(state["A"], state["B"], state.get("A0"), state.get("B0"), frozen)
        adapter.rank, adapter.scaling, adapter.rows = state["A"].shape[0], float(scaling), rows
        return adapter

    def _hold(
        self, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, frozen: Collection[str]
    ) -> None:
        self.frozen = frozenset(frozen)
        self.A = nn.Parameter(A, requires_grad="A" not in frozen)
        self.B = nn.Parameter(B, requires_grad="B" not in frozen)
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)
        self.register_module("magnitude", None)

    @property
    def anchored(self) -> bool:
        return self.A0 is not None

    def trained(self) -> Iterator[nn.Parameter]:
        """The factors that this adapter trains, whether they require grad now or not."""
        yield from (factor for name, factor in self.named_parameters() if name not in self.frozen)

    @property
    def block(self) -> Block:
        """What the fused product takes."""
        held, anchor = self._parameters, self._buffers  # a module's __getattr__ takes ten times as long
        if "A" not in held:  # a replica of nn.DataParallel has plain attributes
            return Block(self.rows, self.A, self.B, self.scaling, self.A0, self.B0)
        return Block(self.rows, held["A"], held["B"], self.scaling, anchor["A0"], anchor["B0"])  # type: ignore[arg-type]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A ``(rank, in)`` and B ``(rows, rank)`` in full, anchors added."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return self.A0 + self.A, self.B0 + self.B

    def product(self) -> Tensor:
        """``ΔW`` (rows, in) in fp32 (fp64 for fp64 parameters), differentiable; zero offsets give zero.

        Magnitudes do not count in it.
        """
        return product(self.block)

    def moved(self) -> bool:
        """Does it change anything yet?"""
        return bool(self.product().any()) or (
            self.magnitude is not None and bool(self.magnitude.offset.any())
        )

    def extra_repr(self) -> str:
        out, rank = self.B.shape
        notes = [f"({out}, {self.A.shape[1]}), rank={rank}, scaling={self.scaling:.4g}"]
        notes += ["anchored"] if self.anchored else []
        notes += ["with magnitudes"] if self.magnitude is not None else []
        notes += [f"{name} frozen" for name in sorted(self.frozen)]
        return ", ".join(notes)


class RowBlocks(nn.ModuleList):
    """All that one name does to one weight: `Adapter`s on rows that do not overlap, and their dropout.

    Of an embedding, or a head tied to one, also the rows that train apart.
    """

    def __init__(
        self, adapters: Iterable[Adapter], dropout: float = 0.0, tokens: TokenOffsets | None = None
    ) -> None:
        super().__init__(adapters)
        self.dropout = dropout
        self.tokens = tokens
        self.rescales = any(adapter.magnitude is not None for adapter in self.held())  # the whole output
        # While acting, ever; not by compiled code: see `seen_by_compiler`.
        self.called = self.read = self.read_in_forward = False

    @property
    def used(self) -> bool:
        """Was the layer ever called, or its weight used in an operation, while these adapters acted?"""
        return self.called or self.read

    def note(self, what: str) -> None:
        self.__dict__[what] = True  # __setattr__ of a module takes ten times as long

    def held(self) -> list[Adapter]:
        held = cast("list[Adapter]", list(self._modules.values()))
        return held if self.tokens is None else held[:-1]

    def blocks(self, weight: Tensor | None = None) -> list[Block]:
        """What the fused product takes, with ΔW multiplied by ``weight``."""
        return [weighted(adapter.block, weight) for adapter in self.held()]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""


def weighted(block: Block, weight: Tensor | None) -> Block:
    """``block`` with ``ΔW`` multiplied by ``weight``, differentiably; None is 1."""
    if weight is None:
        return block
    return block._replace(B=block.B * weight, B0=None if block.B0 is None else block.B0 * weight)


def product(block: Block) -> Tensor:
    """``ΔW`` (rows, in) in fp32 (fp64 for fp64 factors), differentiable; zero offsets give zero."""
    dtype = torch.promote_types(torch.float32, block.A.dtype)
    with without_autocast(block.A):
        A, B = block.A.to(dtype), block.B.to(dtype)
        if block.A0 is None or block.B0 is None:
            return (block.scaling * B) @ A
        A0, B0 = block.A0.to(dtype), block.B0.to(dtype)
        return (block.scaling * B) @ (A0 + A) + (block.scaling * B0) @ A


def updates(blocks: Sequence[Block]) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, ΔW[start:stop])`` for all rows that ``blocks`` update, in order.

    The blocks may overlap: their products add up, in fp32 (fp64 for fp64 factors). Differentiable.
    """
    spans: list[tuple[int, int, Tensor]] = []
    for block in blocks:
        parts = pieces(block.rows)
        deltas = product(block).chunk(len(parts))
        spans += [(start, stop, delta) for (start, stop), delta in zip(parts, deltas, strict=True)]
    spans.sort(key=lambda span: span[:2], reverse=True)
    open_: list[tuple[int, int, Tensor]] = []
    for start, stop in pairwise(sorted({cut for span in spans for cut in span[:2]})):
        open_ = [span for span in open_ if span[1] > start]
        while spans and spans[-1][0] == start:
            open_.append(spans.pop())
        here = [delta[start - first : stop - first] for first, _, delta in open_]
        if here:
            yield start, stop, sum(here[1:], start=here[0])


@torch.no_grad()
def add_updates(weight: Tensor, blocks: Sequence[Block], excess: Tensor | None = None) -> None:
    """Adds all updates to ``weight`` (out, in) in place: some rows at a time in fp32, each rounded once.

    With magnitudes, ``excess`` (out,) is by how much each row is scaled then, less 1.
    """
    for start, stop, update in updates(blocks):
        rows = weight[start:stop]
        update.add_(rows)
        rows.copy_(update if excess is None else update.addcmul_(update, excess[start:stop, None]))


@torch.no_grad()
def full_delta(blocks: Sequence[Block], rows: int) -> Tensor:
    """``ΔW`` (rows, in) of a whole weight in fp32 (fp64 for fp64 factors), detached."""
    A = blocks[0].A
    delta = A.new_zeros(rows, A.shape[1], dtype=torch.promote_types(torch.float32, A.dtype))
    for block in blocks:
        add_(delta, block.rows, product(block))
    return delta
