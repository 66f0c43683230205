"""A Triton kernel for backward: one pass over dY gives both dS = s·dY·B and dB = s·dYᵀ·S.

Importing this file imports Triton; `gemm` does so only when `one_pass` switches it on. It multiplies
three matrices, and knows nothing of anchors or row blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies the bits of bf16 numbers as integers: there they become fp32 first.
_INTERPRETED = triton.knobs.runtime.interpret


class Tiles:
    """How dY ``(N, out)`` is cut: stripes of columns times chunks of rows, one program each.

    It depends on the shapes alone, not on the device or a measurement, and so does the order of all sums.
    """

    def __init__(self, tokens: int, out: int, rank: int) -> None:
        self.rank = max(16, triton.next_power_of_2(rank))  # tl.dot takes no less
        self.columns = 256 if self.rank <= 32 else 64
        self.rows = 64 if self.rank <= 64 else 32
        self.warps = 4 if self.rank <= 32 else 8
        self.stripes = triton.cdiv(out, self.columns)
        # About 256 programs, two for each processor of an H100: more would only make more partial sums.
        self.chunk = self.rows * triton.cdiv(tokens, self.rows * max(1, 256 // self.stripes))
        self.chunks = triton.cdiv(tokens, self.chunk)


def suits(dY: Tensor, rank: int) -> bool:
    """Whether the kernel should take the place of the two products: on CUDA, and where it moves fewer bytes.

    It saves one reading of dY, and spends the writing and reading of partial sums in fp32: with some thousand
    tokens and features that is fewer up to ranks about 32. In fp32 the tensor cores would round its products.
    """
    tokens, out = dY.shape
    if not dY.is_cuda or dY.dtype == torch.float32 or tokens == 0:
        return False
    tiles = Tiles(tokens, out, rank)
    spent = 2 * 4 * rank * (tiles.stripes * tokens + tiles.chunks * out)
    return tokens * out * dY.element_size() > spent


@torch.library.custom_op("lowrank::dS_and_dB", mutates_args=())
def dS_and_dB(dY: Tensor, B: Tensor, S: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``(scaling·dY·B, scaling·dYᵀ·S)`` of dY ``(N, out)``, B ``(out, r)`` and S ``(N, r)``.

    The three have one dtype (fp16, bf16 or fp32) and any strides. dS ``(N, r)`` has it too; dB ``(out, r)``
    is fp32. All sums are taken in fp32, first within the tiles and then over them in one fixed order,
    without atomics: two calls give the same bits.
    """
    (tokens, out), rank = dY.shape, B.shape[1]
    dS, dB = dY.new_empty(tokens, rank), dY.new_empty(out, rank, dtype=torch.float32)
    if tokens == 0:
        return dS, dB.zero_()
    tiles = Tiles(tokens, out, rank)
    dS_parts = dB.new_empty(tiles.stripes, tokens, rank)
    dB_parts = dB.new_empty(tiles.chunks, out, rank)
    _parts_kernel[(tiles.stripes, tiles.chunks)](
        dY, B, S, dS_parts, dB_parts, tokens, out, rank, *dY.stride(), *B.stride(), *S.stride(), tiles.chunk,
        ROWS=tiles.rows, COLUMNS=tiles.columns, RANK=tiles.rank, WIDEN=_INTERPRETED,
        num_warps=tiles.warps,
    )  # fmt: skip
    for parts, total in ((dS_parts, dS), (dB_parts, dB)):
        _sum_kernel[(triton.cdiv(total.numel(), 1024),)](
            parts, total, parts.shape[0], total.numel(), scaling, BLOCK=1024
        )
    return dS, dB


@dS_and_dB.register_fake
def _(dY: Tensor, B: Tensor, S: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return dY.new_empty(S.shape), dY.new_empty(B.shape, dtype=torch.float32)


@triton.jit
def _parts_kernel(  # type: ignore[no-untyped-def]
    dY, B, S, dS_parts, dB_parts, tokens, out, rank,
    dY_row, dY_column, B_row, B_column, S_row, S_column, chunk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One stripe of columns in one chunk of rows: what it adds to dS, and to dB."""
    stripe, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, ranks = stripe * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    in_columns, in_ranks = columns < out, ranks < rank
    b = tl.load(
        B + columns[:, None] * B_row + ranks[None, :] * B_column,
        mask=in_columns[:, None] & in_ranks[None, :],
        other=0.0,
    )
    if WIDEN:
        b = b.to(tl.float32)
    total = tl.full((COLUMNS, RANK), 0.0, tl.float32)
    for first in range(place * chunk, tl.minimum(place * chunk + chunk, tokens), ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)  # rows · stride can pass 2³¹
        in_rows = rows < tokens
        g = tl.load(
            dY + rows[:, None] * dY_row + columns[None, :] * dY_column,
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        s = tl.load(
            S + rows[:, None] * S_row + ranks[None, :] * S_column,
            mask=in_rows[:, None] & in_ranks[None, :],
            other=0.0,
        )
        if WIDEN:
            g, s = g.to(tl.float32), s.to(tl.float32)
        part = tl.dot(g, b, input_precision="ieee")
        tl.store(
            dS_parts + (stripe * tokens + rows[:, None]) * rank + ranks[None, :],
            part,
            mask=in_rows[:, None] & in_ranks[None, :],
        )
        total += tl.dot(tl.trans(g), s, input_precision="ieee")
    tl.store(
        dB_parts + (place * out + columns[:, None]).to(tl.int64) * rank + ranks[None, :],
        total,
        mask=in_columns[:, None] & in_ranks[None, :],
    )


@triton.jit
def _sum_kernel(parts, total, count, size, scaling, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total = scaling · Σ parts`` over the first dimension, in order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.full((BLOCK,), 0.0, tl.float32)
    for index in range(count):
        value += tl.load(parts + index * size + place, mask=inside, other=0.0)
    tl.store(total + place, (value * scaling).to(total.dtype.element_ty), mask=inside)
