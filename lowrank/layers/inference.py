"""The product where no gradient is asked for: no autograd function, nothing kept for backward, few calls.

Generation multiplies one token at a time, and there each call costs more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.block import Block
from lowrank.layers.gemm import accumulate, down, flat, up
from lowrank.linalg.rows import Rows, view

# Up to so many multiplications the fp32 products are faster on a CPU than those in half precision, which take
# 12 to 18 µs however small they are (oneDNN): measured at 192 to 1536 features, ranks 16 and 32.
FEW = 700_000
HALF = (torch.bfloat16, torch.float16)
KEPT_ON_CPU = False  # of more tokens, beside which a cast of the factors costs nothing


def infer(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Block], kept: Kept | None
) -> Tensor:
    """``x·Wᵀ + bias`` by the call of a frozen projection, plus the update of every block, without a graph.

    Where `kept` is given, and x is on an accelerator or has few tokens, the factors are cast and concatenated
    once. On a CPU few tokens in half precision are multiplied by the fp32 masters.
    """
    return _add(F.linear(x, weight, bias), x, blocks, kept)


def infer_beside(y: Tensor, x: Tensor, blocks: Sequence[Block]) -> Tensor:
    """``y``, which is not written to, plus the update of every block, without a graph."""
    return _add(y.clone(memory_format=torch.contiguous_format), x, blocks, None)


def _add(y: Tensor, x: Tensor, blocks: Sequence[Block], kept: Kept | None) -> Tensor:
    if x.is_cpu and _few(x, blocks):
        if x.dtype in HALF:
            laid = kept.laid(blocks, torch.float32) if kept else lay_out(blocks, torch.float32)
            return _add_in_fp32(y, x, laid)
        keeps = kept is not None
    else:
        keeps = kept is not None and (KEPT_ON_CPU or not x.is_cpu)
    laid = kept.laid(blocks, x.dtype) if keeps else lay_out(blocks, x.dtype)  # type: ignore[union-attr]
    y = y.contiguous()
    y2 = flat(y)
    S = torch.mm(flat(x), laid.down.t())
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
    """``y`` plus the update in place, which is rounded once, when it is added."""
    S = F.linear(x.float(), laid.down)
    for rows, columns, right, scaling in laid.ups:
        update = F.linear(S if columns is None else S[..., columns], right)
        if rows == (0, y.shape[-1]):
            y.add_(update, alpha=scaling)
        else:
            part = view(y, rows, dim=y.dim() - 1)
            part.add_(update.view(part.shape), alpha=scaling)
    return y


def _few(x: Tensor, blocks: Sequence[Block]) -> bool:
    entries = 0
    for _, A, B, _, _, _ in blocks:
        if A.dtype is not torch.float32 or B.dtype is not torch.float32:
            return False
        entries += A.numel() + B.numel()
    return x.numel() // x.shape[-1] * entries <= FEW and not torch.is_autocast_enabled("cpu")


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


def lay_out(blocks: Sequence[Block], dtype: torch.dtype) -> Laid:
    if len(blocks) == 1:
        ((rows, A, B, scaling, A0, B0),) = blocks
        return Laid(down(A, A0, dtype), (Up(rows, None, up(B, B0, dtype), scaling),))
    ups, column = [], 0
    for rows, _, B, scaling, _, B0 in blocks:
        right = up(B, B0, dtype)
        ups.append(Up(rows, slice(column, column + right.shape[1]), right, scaling))
        column += right.shape[1]
    return Laid(torch.cat([down(block.A, block.A0, dtype) for block in blocks]), tuple(ups))


def lay_out_to_keep(blocks: Sequence[Block], dtype: torch.dtype) -> Laid:
    """As `lay_out`, without their graph.

    Adapters of the same rows, as in a mixture, become one, with their scalings multiplied in.
    """
    blocks = [block._replace(A=block.A.detach(), B=block.B.detach()) for block in blocks]
    rows = blocks[0].rows
    if len(blocks) == 1 or any(block.rows != rows for block in blocks):
        return lay_out(blocks, dtype)
    rights = [up(block.B, block.B0, block.B.dtype) * block.scaling for block in blocks]
    downs = [down(block.A, block.A0, dtype) for block in blocks]
    return Laid(torch.cat(downs), (Up(rows, None, torch.cat(rights, 1).to(dtype), 1.0),))


class _Seen(NamedTuple):
    """A factor as it was: itself, so that no other takes its place; its memory, kept so too; its version."""

    factor: Tensor
    memory: Tensor
    address: int
    version: int


class Transient:
    """Belongs to one object, and is not copied or pickled along with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Transient:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class Kept(Transient):
    """The factors of one layer as they were laid out last, until one of them changes.

    It holds at most one copy of them, in the dtype of the last activation. The copy is out of date when
    another tensor is in a factor's place, or one was moved, or written to by any operation (its version says
    so). Writing through ``.data`` leaves no trace. Some optimizers do so; a layer calls `drop` whenever it
    builds a graph, which every training step does. Inference tensors have no version, and nothing is kept of
    them; nor under the compiler, nor in a CUDA graph, which would go on with the old copy.
    """

    def __init__(self) -> None:
        self._held: tuple[torch.dtype, list[float], list[_Seen], Laid] | None = None

    def laid(self, blocks: Sequence[Block], dtype: torch.dtype) -> Laid:
        if torch.compiler.is_compiling() or (
            blocks[0].A.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            return lay_out(blocks, dtype)
        held, scalings, factors = self._held, [block.scaling for block in blocks], _factors(blocks)
        if held is not None and held[0] is dtype and held[1] == scalings and _unchanged(held[2], factors):
            return held[3]
        if any(factor.is_inference() for factor in factors):
            self._held = None
            return lay_out(blocks, dtype)
        with torch.inference_mode(False), torch.no_grad():
            laid = lay_out_to_keep(blocks, dtype)
            seen = [_Seen(f, f.detach(), f.data_ptr(), f._version) for f in factors]
        self._held = dtype, scalings, seen, laid
        return laid

    def drop(self) -> None:
        self._held = None


def _factors(blocks: Sequence[Block]) -> list[Tensor]:
    factors = (factor for _, A, B, _, A0, B0 in blocks for factor in (A, B, A0, B0))
    return [factor for factor in factors if factor is not None]


def _unchanged(seen: list[_Seen], factors: list[Tensor]) -> bool:
    if len(seen) != len(factors):
        return False
    for (factor, _, address, version), now in zip(seen, factors, strict=True):
        if factor is not now or version != now._version or address != now.data_ptr():
            return False
    return True
