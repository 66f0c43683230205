"""The product where no gradient is asked for: no autograd function, nothing kept for backward, few calls.

Generation multiplies one token at a time, and there each call costs more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.block import Block
from lowrank.layers.gemm import accumulate, down, flat, up
from lowrank.linalg.rows import view

# Up to so many multiplications the fp32 products are faster on a CPU than those in half precision, which take
# 12 to 18 µs however small they are (oneDNN): measured at 192 to 1536 features, ranks 16 and 32.
FEW = 700_000
HALF = (torch.bfloat16, torch.float16)
KEPT_ON_CPU = False  # there are more tokens then, beside which a cast of the factors costs nothing


class Laid(NamedTuple):
    """Blocks as the product takes them: all A's in one ``(Σ width, in)``, and each B ``(rows, width)``."""

    down: Tensor
    ups: tuple[Tensor, ...]


def infer(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Block], kept: Kept | None
) -> Tensor:
    """``x·Wᵀ + bias`` by the call of a frozen projection, plus the update of every block, without a graph.

    Where `kept` is given and x is on an accelerator, the factors are cast and concatenated once. On a CPU few
    tokens in half precision are multiplied by the fp32 masters as they are, which needs neither.
    """
    return _add(F.linear(x, weight, bias), x, blocks, kept)


def infer_beside(y: Tensor, x: Tensor, blocks: Sequence[Block]) -> Tensor:
    """``y``, which is not written to, plus the update of every block, without a graph."""
    return _add(y.clone(memory_format=torch.contiguous_format), x, blocks, None)


def _add(y: Tensor, x: Tensor, blocks: Sequence[Block], kept: Kept | None) -> Tensor:
    if x.dtype in HALF and x.is_cpu and _few(x, blocks):
        x = x.float()
        for block in blocks:
            _add_in_fp32(y, x, block)
        return y
    keeps = kept is not None and (KEPT_ON_CPU or not x.is_cpu)
    laid = kept.laid(blocks, x.dtype) if keeps else lay_out(blocks, x.dtype)  # type: ignore[union-attr]
    y = y.contiguous()
    y2, column = flat(y), 0
    S = torch.mm(flat(x), laid.down.t())
    for block, right in zip(blocks, laid.ups, strict=True):
        part = S if len(blocks) == 1 else S[:, column : column + right.shape[1]]
        rows = y2 if block.rows == (0, y2.shape[1]) else view(y2, block.rows, dim=1)
        if torch.compiler.is_compiling() and rows is y2:  # costs compiled code less than an operation of ours
            y2 = torch.addmm(y2, part, right.t(), alpha=block.scaling)
            y = y2.view(y.shape)
        else:
            accumulate(rows, part, right.t(), block.scaling)
        column += right.shape[1]
    return y


def _few(x: Tensor, blocks: Sequence[Block]) -> bool:
    entries = 0
    for _, A, B, _, _, _ in blocks:
        if A.dtype != torch.float32 or B.dtype != torch.float32:
            return False
        entries += A.numel() + B.numel()
    return x.numel() // x.shape[-1] * entries <= FEW and not torch.is_autocast_enabled("cpu")


def _add_in_fp32(y: Tensor, x: Tensor, block: Block) -> None:
    """``y += scaling·x·(B·(A0 + A) + B0·A)ᵀ``, rounded once, when it is added."""
    rows, A, B, scaling, A0, B0 = block
    S = F.linear(x, A)
    if A0 is None or B0 is None:
        update = F.linear(S, B)
    else:
        update = F.linear(S, B0).add_(F.linear(S.add_(F.linear(x, A0)), B))
    if rows == (0, y.shape[-1]):
        y.add_(update, alpha=scaling)
    else:
        part = view(y, rows, dim=y.dim() - 1)
        part.add_(update.view(part.shape), alpha=scaling)


def lay_out(blocks: Sequence[Block], dtype: torch.dtype) -> Laid:
    downs = [down(block.A, block.A0, dtype) for block in blocks]
    return Laid(
        downs[0] if len(downs) == 1 else torch.cat(downs),
        tuple(up(block.B, block.B0, dtype) for block in blocks),
    )


class _Seen(NamedTuple):
    """A factor as it was: itself, so that no other takes its place; its memory, kept so too; its version."""

    factor: Tensor
    memory: Tensor
    address: int
    version: int


class Kept:
    """The factors of one layer as they were laid out last, until one of them changes.

    It holds at most one copy of them, in the dtype of the last activation. The copy is out of date when
    another tensor is in a factor's place, or one was moved, or written to by any operation (its version says
    so). Writing through ``.data`` leaves no trace. Some optimizers do so; a layer calls `drop` whenever it
    builds a graph, which every training step does. Inference tensors have no version, and nothing is kept of
    them; nor under the compiler, nor in a CUDA graph, which would go on with the old copy. It is not copied
    or pickled along.
    """

    def __init__(self) -> None:
        self._held: tuple[torch.dtype, list[_Seen], Laid] | None = None

    def laid(self, blocks: Sequence[Block], dtype: torch.dtype) -> Laid:
        if torch.compiler.is_compiling() or _capturing():
            return lay_out(blocks, dtype)
        held, factors = self._held, [*_factors(blocks)]
        if held is not None and held[0] == dtype and _unchanged(held[1], factors):
            return held[2]
        if any(factor.is_inference() for factor in factors):
            self._held = None
            return lay_out(blocks, dtype)
        with torch.inference_mode(False), torch.no_grad():
            laid = lay_out(blocks, dtype)
            seen = [_Seen(f, f.detach(), f.data_ptr(), f._version) for f in factors]
        self._held = dtype, seen, laid
        return laid

    def drop(self) -> None:
        self._held = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def _factors(blocks: Sequence[Block]) -> Iterator[Tensor]:
    for _, A, B, _, A0, B0 in blocks:
        yield A
        yield B
        if A0 is not None and B0 is not None:
            yield A0
            yield B0


def _unchanged(seen: list[_Seen], factors: list[Tensor]) -> bool:
    return len(seen) == len(factors) and all(
        s.factor is f and s.version == f._version and s.address == f.data_ptr()
        for s, f in zip(seen, factors, strict=True)
    )


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
