"""The contenders of `bench_linear`: every way to run one adapted projection that it compares.

All compute ``y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ`` from the same numbers. Nothing here is used by the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.layers.adapter import Adapter
from lowrank.layers.functional import Block, fused_lora
from lowrank.layers.linear import LoRALinear


@dataclass(frozen=True)
class Case:
    """One projection ``(out, in)`` on N tokens."""

    out_features: int
    in_features: int
    tokens: int
    rank: int
    dtype: torch.dtype
    dropout: float = 0.0
    device: str = "cpu"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dropout = f" dropout={self.dropout}" if self.dropout else ""
        return f"{dtype} {self.out_features}×{self.in_features} N={self.tokens} r={self.rank}{dropout}"

    def limit(self, *, frozen_A: bool = False, width: int = 1) -> float:
        """T/T_frozen by floating point operations alone; `width` 2 for an anchored pair."""
        out, into, r = self.out_features, self.in_features, self.rank
        gradients = out + (0 if frozen_A else into)  # of B and of A, at rank r
        return 1 + r * (width * (2 * into + 2 * out) + gradients) / (2 * out * into)


@dataclass(frozen=True)
class Contender:
    """One way to run the projection.

    `run` maps x to y; `factors` are what it trains, and `update` makes ΔW of them, for the check; `alive` is
    what exists whether or not backward keeps it; `limit` is the T/T_frozen that it could reach.
    """

    run: Callable[[Tensor], Tensor]
    factors: tuple[Tensor, ...]
    update: Callable[..., Tensor] | None
    alive: tuple[Tensor, ...]
    limit: float


def contenders(case: Case, *, compiled: bool = True) -> dict[str, Contender]:
    """All contenders of a case. Half-precision bases get fp32 factors where that is a library's default."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[1] ** 0.5

    s, rank = 2.0, case.rank
    weight = normal(case.out_features, case.in_features).to(case.device, case.dtype)
    A, B = normal(rank, case.in_features).to(case.device), normal(case.out_features, rank).to(case.device)
    A0, B0 = (torch.randn_like(t) / t.shape[1] ** 0.5 for t in (A, B))

    def trained(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(nn.Parameter(tensor.to(dtype, copy=True)) for tensor in tensors)

    def both(A: Tensor, B: Tensor) -> Tensor:
        return s * B @ A

    def only_B(B: Tensor) -> Tensor:
        return s * B @ A.to(B.dtype)

    def offsets(a: Tensor, b: Tensor) -> Tensor:
        return s * (b @ (A0.to(a.dtype) + a) + B0.to(a.dtype) @ a)

    def made(
        run: Callable[..., Tensor],
        *factors: Tensor,
        update: Callable[..., Tensor] = both,
        constants: Sequence[Tensor] = (),
        **limit: Any,
    ) -> Contender:
        def bound(x: Tensor) -> Tensor:
            return run(x, weight, *factors, s, case.dropout)

        return Contender(bound, factors, update, (weight, *factors, *constants), case.limit(**limit))

    def ours_frozen_A(x: Tensor, weight: Tensor, B: Tensor, s: float, p: float) -> Tensor:
        return ours(x, weight, A, B, s, p)

    def ours_anchored(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:
        return fused_lora(x, weight, None, [Block((0, weight.shape[0]), a, b, s, A0, B0)], dropout=p)

    half = case.dtype
    entries = {
        "frozen": Contender(lambda x: F.linear(x, weight), (), None, (weight,), 1.0),
        "naive": made(naive, *trained(A, B, dtype=half)),
        **{f"PEFT, {kind}": _peft(case, weight, A, B, s, cast, both) for kind, cast in PEFT_KINDS.items()},
        "Unsloth order": made(unsloth_order, *trained(A, B, dtype=half)),
        "ours": made(ours, *trained(A, B)),
        "ours, the layer": _layer(case, weight, A, B, s, both),
        "ours, A frozen": made(ours_frozen_A, *trained(B), update=only_B, constants=[A], frozen_A=True),
        "ours, anchored": made(ours_anchored, *trained(A, B), update=offsets, constants=[A0, B0], width=2),
        "ours, update first": made(update_first, *trained(A, B)),
    }
    if half != torch.float32:
        entries["ours, half factors"] = made(ours, *trained(A, B, dtype=half))
    if compiled:
        entries["naive, compiled"] = made(torch.compile(naive), *trained(A, B, dtype=half))
        entries["ours, compiled"] = made(torch.compile(ours, fullgraph=True), *trained(A, B))
    return entries


def naive(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float, p: float) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(F.dropout(x, p), A), B) * s


def ours(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float, p: float) -> Tensor:
    return fused_lora(x, weight, None, [Block((0, weight.shape[0]), A, B, s)], dropout=p)


def update_first(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float, p: float) -> Tensor:
    """Not bit for bit the base at a zero update, but one reading of y less."""
    return fused_lora(x, weight, None, [Block((0, weight.shape[0]), A, B, s)], dropout=p, exact=False)


def _linear(case: Case, weight: Tensor) -> nn.Linear:
    linear = nn.Linear(case.in_features, case.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _layer(
    case: Case, weight: Tensor, A: Tensor, B: Tensor, s: float, update: Callable[..., Tensor]
) -> Contender:
    """What a wrapped model runs: the product with a module around it."""
    rows = (0, case.out_features)
    adapter = Adapter(A, torch.zeros_like(B), s, rows=rows)
    with torch.no_grad():
        adapter.B.copy_(B)  # as after training: from B = 0, so not anchored
    shape = {"in_features": case.in_features, "out_features": case.out_features}
    layer = LoRALinear(_linear(case, weight), [adapter], dropout=case.dropout, **shape).train()
    factors = (adapter.A, adapter.B)
    return Contender(layer, factors, update, (weight, *factors), case.limit())


PEFT_KINDS = {"autocast_adapter_dtype": True, "no autocast_adapter_dtype": False}
"""With it, PEFT's default, half-precision adapters become fp32; without, they have the base's dtype."""


def _peft(
    case: Case,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    cast: bool,
    update: Callable[..., Tensor],
) -> Contender:
    import peft

    model: Any = nn.Module()
    model.projection = _linear(case, weight)
    config = peft.LoraConfig(
        r=case.rank, lora_alpha=s * case.rank, target_modules=["projection"], lora_dropout=case.dropout
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    layer = model.base_model.model.projection
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    with torch.no_grad():
        for parameter, value in zip(factors, (A, B), strict=True):
            parameter.copy_(value)
    return Contender(layer.train(), factors, update, (weight, *factors), case.limit())


class _UnslothOrder(torch.autograd.Function):
    """The order of Unsloth's functions: x alone is kept, x·Aᵀ is computed again and dY·B twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.s = s
        return F.linear(x, weight).addmm_(x @ A.t(), B.t(), alpha=s)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        dA = ctx.s * ((dY @ B).t() @ x)
        dB = ctx.s * (dY.t() @ (x @ A.t()))
        dX = (dY @ weight).addmm_(dY @ B, A, alpha=ctx.s)
        return dX, None, dA, dB, None


def unsloth_order(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float, p: float) -> Tensor:
    if p == 0:
        return _UnslothOrder.apply(x, weight, A, B, s)
    return naive(x, weight, A, B, s, p)  # its functions are for dropout 0, and leave the rest to the modules
