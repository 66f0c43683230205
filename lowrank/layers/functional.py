"""The fused low-rank product: a frozen projection and its adapters as one differentiable operation.

Plain tensors in, a plain tensor out. It knows no module and no model, owns no parameter and chooses no rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lowrank.layers.block import Block
from lowrank.layers.gemm import down, up
from lowrank.layers.inference import Kept, infer, infer_beside
from lowrank.layers.row_blocks import RowBlockProduct
from lowrank.layers.single import SingleProduct
from lowrank.layers.tuning import Tuned, allowed, case_of
from lowrank.linalg.precision import autocasts
from lowrank.linalg.rows import height, lie_within, spread

BASE_FIRST = "base first"
ORDERS = Tuned(
    "one adapter",
    {
        BASE_FIRST: lambda *arguments: SingleProduct.apply(*arguments, True),
        "update first": lambda *arguments: SingleProduct.apply(*arguments, False),
    },
)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """``x·Wᵀ + bias + scaling · (x·Aᵀ)·Bᵀ`` as one differentiable operation.

    x ``(..., in)``; weight ``(out, in)``, any strides; bias ``(out,)`` or None; A ``(r, in)``;
    B ``(out, r)``. Returns ``(..., out)`` in x's dtype. The one-block case of `fused_lora`, which says more.
    """
    block = Block((0, weight.shape[0]), A, B, scaling)
    check_blocks(weight.shape[0], weight.shape[1], (block,))
    return fused_lora(x, weight, bias, (block,))


def fused_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Sequence[Block],
    *,
    dropout: float = 0.0,
    exact: bool | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias)`` plus the update of every block, in one pass over x.

    x ``(..., in)``, weight ``(out, in)`` of any strides, bias ``(out,)`` or None; returns ``(..., out)``.
    The base product comes first, by the very call that a frozen projection makes, so that an update of
    zero leaves its value bit for bit (but see `exact`). Factors of another dtype are cast to x's; their
    gradients come back in their own. Under autocast all runs in autocast's dtype. `dropout` is the share of
    x's entries that is hidden from the adapters, and from them alone: a caller passes it in training only.

    With `exact` off, one block over all rows is multiplied first and the base product accumulates onto it,
    which saves a reading of y; an update of zero then leaves the base's value to the dtype's rounding only.
    By default, None, that is the exact order, and in training the faster one where tuning is on (`tuning`).

    For backward it keeps x itself (only where an A or the weight is trained) and the ``(tokens, Σr)``
    product of x with the A's. The gradients are those of LoRA (2106.09685, section 4.1). It can be
    differentiated once: a second derivative raises RuntimeError. Under `torch.func` and in forward mode it is
    composed of ordinary operations, which can be differentiated and mapped at will. Where grad is off no
    graph is built (see `infer`), and `kept` holds the cast factors from call to call. The blocks are not
    checked at each call: see `check_blocks`.
    """
    x, weight, bias = to_autocast(x, weight, bias)
    if transformed():
        return _composed(F.linear(x, weight, bias), x, blocks, dropout)
    if exact is not False and dropout == 0 and not torch.is_grad_enabled():
        return infer(x, weight, bias, blocks, kept)
    if len(blocks) > 1 or blocks[0].rows != (0, weight.shape[0]):
        return RowBlockProduct.apply(x, None, weight, bias, *_laid_out(x, blocks, dropout))
    ((_, A, B, scaling, A0, B0),) = blocks
    mask = None
    if dropout > 0:
        # What dropout keeps is to weigh more: the scaling does that, and no pass over x has to.
        mask, scaling = _mask(x, dropout), scaling / (1 - dropout)
    arguments = (x, weight, bias, A, B, A0, B0, mask, scaling)
    if exact is None:
        case = case_of(x, weight, bias, A.shape[0], A0 is not None) if allowed() else None
        exact = case is None or ORDERS.choice(case, arguments) == BASE_FIRST
    return SingleProduct.apply(*arguments, exact)


def to_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as F.linear would take them: in autocast's dtype where it is on, and fp64 as it is."""
    if autocasts(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return x, weight, bias


def add_lora(y: Tensor, x: Tensor, blocks: Sequence[Block], *, dropout: float = 0.0) -> Tensor:
    """``y`` plus the update of every block: for a base that can only be called (quantized, or special).

    y ``(..., out)`` is what the base made of x ``(..., in)``; it is not written to. The update is computed
    in y's dtype, and an update of zero returns y bit for bit. Otherwise as `fused_lora`.
    """
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} must agree in all but the last dimension"
        )
    x = x.to(y.dtype)
    if transformed():
        return _composed(y, x, blocks, dropout)
    if dropout == 0 and not torch.is_grad_enabled():
        return infer_beside(y, x, blocks)
    return RowBlockProduct.apply(x, y, None, None, *_laid_out(x, blocks, dropout))


def transformed() -> bool:
    """Is a transform of `torch.func` (vmap, grad, jvp …) or forward-mode differentiation going on?

    These cannot see into the autograd functions here.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _composed(y: Tensor, x: Tensor, blocks: Sequence[Block], dropout: float) -> Tensor:
    """``y`` plus the update of every block, from operations that PyTorch itself knows how to transform."""
    x = F.dropout(x, dropout)
    for rows, A, B, scaling, A0, B0 in blocks:
        update = F.linear(F.linear(x, down(A, A0, x.dtype)), up(B, B0, x.dtype))
        y = y + spread(scaling * update, rows, y.shape[-1])
    return y


def _laid_out(x: Tensor, blocks: Sequence[Block], dropout: float) -> tuple:
    """The mask, the spans and the factors, one by one: autograd sees only tensors that are arguments."""
    mask = _mask(x, dropout) if dropout > 0 else None
    spans = [(block.rows, block.scaling / (1 - dropout)) for block in blocks]
    return mask, spans, *(factor for _, A, B, _, A0, B0 in blocks for factor in (A, B, A0, B0))


def _mask(x: Tensor, dropout: float) -> Tensor:
    """True where x is kept, ``(tokens, in)``. It is kept for backward: drawing it again takes longer."""
    shape = (x.shape[:-1].numel(), x.shape[-1])
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
    # bernoulli_ draws one number an entry; here each draw makes four, to the nearest 1/65536.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.int16)[: x.numel()].view(shape) >= round(dropout * 2**16) - 2**15


def check_blocks(out_features: int, in_features: int, blocks: Sequence[Block]) -> None:
    """Raises ValueError unless the blocks fit a weight ``(out_features, in_features)``."""
    if not blocks:
        raise ValueError("expected at least one block")
    for rows, A, B, _, A0, B0 in blocks:
        if not lie_within(rows, out_features):
            raise ValueError(f"rows {rows} must lie within the weight's {out_features} rows")
        rank = A.shape[0]
        if A.shape != (rank, in_features) or B.shape != (height(rows), rank):
            raise ValueError(
                f"A {tuple(A.shape)} and B {tuple(B.shape)} must be ({rank}, {in_features}) and "
                f"({height(rows)}, {rank}) to update rows {rows}"
            )
        if (A0 is None) != (B0 is None):
            raise ValueError("an anchor needs both A0 and B0")
        if A0 is not None and B0 is not None and (A0.shape != A.shape or B0.shape != B.shape):
            raise ValueError(
                f"the anchor's A0 {tuple(A0.shape)} and B0 {tuple(B0.shape)} must have the shapes "
                f"of its offsets, {tuple(A.shape)} and {tuple(B.shape)}"
            )
