"""The product where no gradient is asked for: no autograd function, nothing kept for backward, few calls.

Generation multiplies one token at a time, and there each call costs more than its arithmetic.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.block import Block, same_blocks
from lowrank.layers.gemm import accumulate, down, flat, joined, up
from lowrank.layers.steps import steps
from lowrank.layers.transient import Transient
from lowrank.linalg.rows import Rows, view

# Up to so many multiplications a product in fp32, its casts included, is faster on a CPU than one in half
# precision, which takes 12 to 18 µs however small it is (oneDNN): measured at 192 to 1536 features, ranks 16
# and 32, of x with the A's and of that with the B's.
FEW_DOWN, FEW_UP = 550_000, 430_000
FEW_COMPILED = 700_000  # of both together: each kind of product is a compilation
HALF = (torch.bfloat16, torch.float16)
KEPT_ON_CPU = 256  # tokens; of more, a cast of the factors costs nothing beside them


def infer(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Block], kept: Kept | None
) -> Tensor:
    """``x·Wᵀ + bias`` by the call of a frozen projection, plus the update of every block, without a graph.

    Where `kept` is given, and x is on an accelerator or has not many tokens, the factors are cast,
    concatenated and scaled once. On a CPU few tokens in half precision are multiplied in fp32.
    """
    return _add(F.linear(x, weight, bias), x, blocks, kept)


def infer_beside(y: Tensor, x: Tensor, blocks: Sequence[Block]) -> Tensor:
    """``y``, which is not written to, plus the update of every block, without a graph."""
    return _add(y.clone(memory_format=torch.contiguous_format), x, blocks, None)


def _add(y: Tensor, x: Tensor, blocks: Sequence[Block], kept: Kept | None) -> Tensor:
    laid = Kinds.of(blocks, x).laid(blocks, x) if kept is None else kept.laid(blocks, x)
    if laid.in_fp32:
        return _add_in_fp32(y, x, laid)
    y = y.contiguous()
    y2 = flat(y)
    S = _down(x, laid)
    if S.dtype is not x.dtype:
        S = S.to(x.dtype)
    S = flat(S)
    for rows, columns, right, scaling in laid.ups:
        part = S if columns is None else S[:, columns]
        whole = rows == (0, y2.shape[1])
        if torch.compiler.is_compiling() and whole:  # costs compiled code less than an operation of ours
            y2 = torch.addmm(y2, part, right.t(), alpha=scaling)
            y = y2.view(y.shape)
        else:
            accumulate(y2 if whole else view(y2, rows, dim=1), part, right.t(), scaling)
    return y


def _add_in_fp32(y: Tensor, x: Tensor, laid: Laid) -> Tensor:
    """``y`` plus the update in place, which is rounded once, when it is added. The scaling is in the B's."""
    S = _down(x, laid)
    if S.dtype is not torch.float32:
        S = S.float()
    for rows, columns, right, _ in laid.ups:
        update = F.linear(S if columns is None else S[..., columns], right)
        if rows == (0, y.shape[-1]):
            y.add_(update)
        else:
            part = view(y, rows, dim=y.dim() - 1)
            part.add_(update.view(part.shape))
    return y


def _down(x: Tensor, laid: Laid) -> Tensor:
    """x·downᵀ in the dtype that `down` is laid out in."""
    if laid.down.dtype is x.dtype:
        return torch.mm(flat(x), laid.down.t()) if not laid.in_fp32 else F.linear(x, laid.down)
    return F.linear(x.float(), laid.down)


class Kinds(NamedTuple):
    """Up to how many tokens each of the two products is one in fp32; 0 where none is."""

    down: int
    up: int

    @staticmethod
    def of(blocks: Sequence[Block], x: Tensor) -> Kinds:
        if not x.is_cpu or x.dtype not in HALF or torch.is_autocast_enabled("cpu"):
            return Kinds(0, 0)
        downs = ups = 0
        for _, A, B, _, A0, _ in blocks:
            if A.dtype is not torch.float32 or B.dtype is not torch.float32:
                return Kinds(0, 0)
            width = 1 if A0 is None else 2
            downs, ups = downs + width * A.numel(), ups + width * B.numel()
        if torch.compiler.is_compiling():
            both = FEW_COMPILED // (downs + ups)
            return Kinds(both, both)
        return Kinds(FEW_DOWN // downs, FEW_UP // ups)

    def dtypes(self, tokens: int, half: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        low, high = (torch.float32 if self.few(tokens, most) else half for most in self)
        return low, high

    @staticmethod
    def few(tokens: int, most: int) -> bool:
        return 0 < tokens <= most

    def alike(self, tokens: int, most: int) -> tuple[int, int]:
        """The least and the most tokens for which both products are as for ``tokens``, at most ``most``."""
        cuts = sorted({0, *self, most})
        return max(c for c in cuts if c < tokens) + 1, min(c for c in cuts if c >= tokens)

    def laid(self, blocks: Sequence[Block], x: Tensor) -> Laid:
        tokens = tokens_of(x)
        return lay_out(blocks, *self.dtypes(tokens, x.dtype), in_fp32=self.few(tokens, self.up))


def tokens_of(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


class Up(NamedTuple):
    """What multiplies some columns of x·downᵀ (None: all of them), and where the product is added."""

    rows: Rows
    columns: slice | None
    right: Tensor  # (rows, width)
    scaling: float


class Laid(NamedTuple):
    """Blocks as the product takes them: all A's in one ``(Σ width, in)``, and what multiplies that."""

    down: Tensor
    ups: tuple[Up, ...]
    in_fp32: bool  # the sum, of half-precision activations; then the scalings are in the B's


def lay_out(blocks: Sequence[Block], low: torch.dtype, high: torch.dtype, *, in_fp32: bool = False) -> Laid:
    """The A's in dtype `low` and the B's in `high`; `in_fp32` says that the sum is in fp32."""
    downs, ups, column = [], [], 0
    for rows, A, B, scaling, A0, B0 in blocks:
        right = up(B, B0, high)
        columns = None if len(blocks) == 1 else slice(column, column + right.shape[1])
        ups.append(Up(rows, columns, right * scaling if in_fp32 else right, scaling))
        downs.append(down(A, A0, low))
        column += right.shape[1]
    return Laid(joined(downs), tuple(ups), in_fp32)


def lay_out_to_keep(
    blocks: Sequence[Block], low: torch.dtype, high: torch.dtype, *, in_fp32: bool = False
) -> Laid:
    """As `lay_out`, without their graph.

    Adapters of the same rows, as in a mixture, become one, with their scalings multiplied in. What is
    multiplied in fp32 has its B's stored by columns, which one token reads faster.
    """
    blocks = [block._replace(A=block.A.detach(), B=block.B.detach()) for block in blocks]
    rows = blocks[0].rows
    if len(blocks) > 1 and all(block.rows == rows for block in blocks):
        rights = [up(block.B, block.B0, block.B.dtype) * block.scaling for block in blocks]
        downs = [down(block.A, block.A0, low) for block in blocks]
        laid = Laid(torch.cat(downs), (Up(rows, None, torch.cat(rights, 1).to(high), 1.0),), in_fp32)
    else:
        laid = lay_out(blocks, low, high, in_fp32=in_fp32)
    if not in_fp32:
        return laid
    by_columns = (each._replace(right=each.right.t().contiguous().t()) for each in laid.ups)
    return laid._replace(ups=tuple(by_columns))


class _Held(NamedTuple):
    """Factors as they were laid out, and for which calls. `memory` keeps each from being reused."""

    blocks: tuple[Block, ...]
    dtype: torch.dtype  # of x
    autocast: bool
    least: int  # tokens
    most: int
    seen: list[tuple[Tensor, int, int]]  # each factor, its address and its version
    steps: int  # of all optimizers
    memory: list[Tensor]
    laid: Laid

    def serves(self, blocks: Sequence[Block], x: Tensor) -> bool:
        """Is it what this call needs? A tuple of blocks that was seen before is not looked into again."""
        if self.blocks is not blocks and not same_blocks(self.blocks, blocks):
            return False
        if self.dtype is not x.dtype or self.autocast is not torch.is_autocast_enabled("cpu"):
            return False
        if not self.least <= tokens_of(x) <= self.most or self.steps != steps.count:
            return False
        for factor, address, version in self.seen:
            if version != factor._version or address != factor.data_ptr():
                return False
        return True


class Kept(Transient):
    """The factors of one layer as they were laid out last, until one of them changes.

    It holds at most one copy of them, for the dtype of the last activation and about as many tokens. The copy
    is out of date when another tensor is in a factor's place, or one was moved, or written to by any
    operation (its version says so), or when an optimizer has taken a step. Writing through ``.data`` leaves
    no trace; a layer calls `drop` whenever it builds a graph, and when its mode is set. Inference tensors
    have no version; nothing is kept of them; nor under the compiler, nor in a CUDA graph, which would go on
    with the old copy.
    """

    def __init__(self) -> None:
        self._held: _Held | None = None

    def laid(self, blocks: Sequence[Block], x: Tensor) -> Laid:
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return Kinds.of(blocks, x).laid(blocks, x)
        held = self._held
        if held is not None and held.serves(blocks, x):
            return held.laid
        kinds, tokens = Kinds.of(blocks, x), tokens_of(x)
        if x.is_cpu and not 0 < tokens <= KEPT_ON_CPU:
            return kinds.laid(blocks, x)
        factors = [factor for _, A, B, _, A0, B0 in blocks for factor in (A, B, A0, B0) if factor is not None]
        if any(factor.is_inference() for factor in factors):
            self._held = None
            return kinds.laid(blocks, x)
        least, most = kinds.alike(tokens, KEPT_ON_CPU) if x.is_cpu else (0, sys.maxsize)
        with torch.inference_mode(False), torch.no_grad():
            in_fp32 = kinds.few(tokens, kinds.up)
            laid = lay_out_to_keep(blocks, *kinds.dtypes(tokens, x.dtype), in_fp32=in_fp32)
            seen = [(factor, factor.data_ptr(), factor._version) for factor in factors]
            memory = [factor.detach() for factor in factors]
        autocast = torch.is_autocast_enabled("cpu")
        held = _Held(tuple(blocks), x.dtype, autocast, least, most, seen, steps.watched(), memory, laid)
        self._held = held
        return laid

    def drop(self) -> None:
        self._held = None
