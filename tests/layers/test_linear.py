"""The adapted layer over each kind of base, and what its adapters hold."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.layers import Adapter, LoRALinear
from lowrank.layers.acting import Acting
from lowrank.layers.bases import plain_weight
from lowrank.layers.functional import Block
from lowrank.layers.ready import Ready
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import (
    AdaptedWeight,
    WeightAdapters,
    adapt_weights,
    effective_weight,
    release_weights,
)


def adapter(
    rows: tuple[int, int] = (0, 6), *, anchored: bool = False, width: int = 8, **kwargs: object
) -> Adapter:
    A = torch.randn(3, width)
    B = torch.randn(rows[1] - rows[0], 3) if anchored else torch.zeros(rows[1] - rows[0], 3)
    return Adapter(A, B, 0.5, rows=rows, **kwargs)


def moved(made: Adapter) -> Adapter:
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p))
    return made


class OwnForward(nn.Linear):
    """Not what its weight says: a base that may only be called."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias) + 1


BASES = {
    "linear": lambda: nn.Linear(8, 6),
    "no bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
    "own forward": lambda: OwnForward(8, 6),
}


def layer_over(base: nn.Module, *adapters: Adapter, dropout: float = 0.0) -> LoRALinear:
    return LoRALinear(base, adapters, in_features=8, out_features=6, dropout=dropout)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_it_starts_as_the_base_and_adds_its_delta(kind: str, anchored: bool) -> None:
    base, x = BASES[kind]().requires_grad_(False), torch.randn(2, 5, 8)
    made = adapter(anchored=anchored)
    layer = layer_over(base, made)
    assert torch.equal(layer(x), base(x))
    moved(made)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta_weight().T)
    layer.acting.names = ()
    assert torch.equal(layer(x), base(x))


def test_blocks_of_rows() -> None:
    base, x = nn.Linear(8, 6), torch.randn(4, 8)
    blocks = [moved(adapter((0, 2))), moved(adapter((4, 6), anchored=True))]
    layer = layer_over(base, *blocks)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta_weight().T)
    assert not layer.delta_weight()[2:4].any()
    assert layer.rank == 6 and layer.scaling == 0.5


def test_blocks_with_scalings_of_their_own_have_no_common_one() -> None:
    layer = layer_over(
        nn.Linear(8, 6), adapter((0, 2)), Adapter(torch.ones(1, 8), torch.zeros(2, 1), 2.0, rows=(2, 4))
    )
    with pytest.raises(ValueError, match=r"scalings of their own: \[0.5, 2.0\]"):
        _ = layer.scaling


def test_an_anchor_trains_as_a_residual_weight_would() -> None:
    """The gradients of (W − s·B0·A0) + s·B·A, without writing W (PiSSA, 2404.02948, section 3)."""
    base, x, made = (
        nn.Linear(8, 6).double(),
        torch.randn(4, 8).double(),
        adapter(anchored=True, dtype=torch.float64),
    )
    A0, B0 = made.factors()
    A, B = A0.detach().clone().requires_grad_(), B0.detach().clone().requires_grad_()
    residual = base.weight.detach() - 0.5 * (B0 @ A0).detach()
    layer = layer_over(base, made)
    layer(x).square().sum().backward()
    F.linear(x, residual + 0.5 * B @ A, base.bias.detach()).square().sum().backward()
    torch.testing.assert_close(made.A.grad, A.grad)
    torch.testing.assert_close(made.B.grad, B.grad)


def test_a_frozen_factor_at_an_anchor_leaves_an_ordinary_adapter() -> None:
    made = adapter(anchored=True, frozen={"A"})
    assert not made.anchored and not made.B.any() and made.frozen == {"A"}
    assert [p.requires_grad for p in (made.A, made.B)] == [False, True]


def test_state_is_kept_bit_for_bit() -> None:
    for made in (moved(adapter()), moved(adapter(anchored=True)), moved(adapter(frozen={"A"}))):
        again = Adapter.from_state(made.state_dict(), made.scaling, rows=made.rows, frozen=made.frozen)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in made.state_dict().items())
        assert torch.equal(again.product(), made.product()) and again.frozen == made.frozen


@pytest.mark.parametrize(
    ("A", "B", "options", "message"),
    [
        (torch.ones(2, 8), torch.ones(5, 2), {}, "do not fit rows"),
        (torch.ones(2, 8), torch.ones(6, 3), {}, "do not fit rows"),
        (torch.ones(2, 8), torch.full((6, 2), float("inf")), {}, "not finite"),
        (torch.ones(2, 8), torch.zeros(6, 2), {"frozen": {"B"}}, "a frozen B must not be zero"),
        (torch.ones(2, 8), torch.ones(6, 2), {"frozen": {"A", "B"}}, 'expected at most one of "A" and "B"'),
        (torch.ones(2, 8), torch.ones(6, 2), {"frozen": {"C"}}, 'expected at most one of "A" and "B"'),
    ],
)
def test_factors_that_make_no_adapter(A: Tensor, B: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter(A, B, 1.0, rows=(0, 6), **options)


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    base, x = nn.Linear(8, 6).requires_grad_(False), torch.ones(2000, 8)
    layer = layer_over(base, moved(adapter()), dropout=0.5).train()
    whole = layer.eval()(x)
    dropped = layer.train()(x)
    assert torch.equal(layer.eval()(x), whole) and not torch.equal(dropped, whole)
    assert ((dropped.mean(0) - whole[0]).abs() < 5 * dropped.std(0) / len(x) ** 0.5).all()
    layer.acting.names = ()
    assert torch.equal(layer.train()(x), base(x))


def test_it_is_called_as_its_base_is() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(input) * scale

    x = torch.randn(3, 4)
    for base, args, kwargs in (
        (nn.Linear(4, 2), (), {"input": x}),
        (Scaled(4, 2), (x, 3.0), {}),
        (Scaled(4, 2), (x,), {"scale": 3.0}),
    ):
        base.requires_grad_(False)
        adapter = Adapter(torch.randn(1, 4), torch.zeros(2, 1), 1.0, rows=(0, 2))
        layer = LoRALinear(base, [adapter], in_features=4, out_features=2)
        assert torch.equal(layer(*args, **kwargs), base(*args, **kwargs))
        with torch.no_grad():
            adapter.B.fill_(1.0)
        torch.testing.assert_close(layer(*args, **kwargs), base(*args, **kwargs) + x @ layer.delta_weight().T)


def test_hooks_on_the_base_still_run() -> None:
    base, x = nn.Linear(8, 6), torch.randn(4, 8)
    layer = layer_over(base, moved(adapter()))
    assert plain_weight(base) is base.weight
    seen: list[Tensor] = []
    base.register_forward_hook(lambda module, args, output: seen.append(output))
    assert plain_weight(base) is None
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta_weight().T)
    assert len(seen) == 2


def test_what_acts_is_found_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    found, find = [], Ready._find
    monkeypatch.setattr(Ready, "_find", lambda *a: (found.append(1), find(*a)))
    layer = LoRALinear(nn.Linear(8, 6), [moved(adapter())], in_features=8, out_features=6)
    x = torch.randn(5, 8)

    def right() -> bool:
        y = layer.train()(x)
        y.sum().backward()
        W = layer.base.weight + layer.delta_weight()
        return torch.allclose(y, F.linear(x, W, layer.bias), atol=1e-4)

    assert all(right() for _ in range(3)) and len(found) == 1
    with torch.no_grad():
        next(iter(layer.adapters["default"])).B.mul_(3)
    assert right() and len(found) == 1
    next(iter(layer.adapters["default"])).scaling = 2.0
    assert right() and len(found) == 2
    layer.put("default", [moved(adapter())])
    assert right() and len(found) == 3
    layer.adapters["default"].dropout = 0.5
    assert not right() and len(found) == 4


def test_a_linear_of_zeros_and_one_row_inputs() -> None:
    layer = layer_over(nn.Linear(8, 6), moved(adapter()))
    for shape in ((8,), (0, 8), (2, 0, 8), (1, 1, 1, 8)):
        x = torch.randn(shape)
        wanted = layer.base(x) + x @ layer.delta_weight().T
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-4)


def test_printing_says_what_it_is() -> None:
    text = repr(layer_over(nn.Linear(8, 6), adapter(anchored=True)))
    assert "in_features=8, out_features=6" in text and "rank=3, scaling=0.5, anchored" in text


# -- on the weight ----------------------------------------------------------------------------------------


def on(param: str, *adapters: Adapter) -> WeightAdapters:
    made = WeightAdapters(Acting(("default",)))
    made.put("default", {param: adapters}, {})
    return made


def test_an_adapted_weight_reads_as_the_sum() -> None:
    module = nn.Linear(8, 6)
    plain, made = module.weight.detach().clone(), moved(adapter((2, 5)))
    adapt_weights(module, on("weight", made))
    expected = plain.clone()
    expected[2:5] += made.product().detach()
    torch.testing.assert_close(module.weight, expected)
    assert isinstance(module, AdaptedWeight) and isinstance(module, nn.Linear)
    module(torch.randn(3, 8)).sum().backward()
    assert made.A.grad is not None and made.B.grad is not None
    release_weights(module)
    assert type(module) is nn.Linear and torch.equal(module.weight, plain)


def test_the_update_is_computed_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.MultiheadAttention(8, 2)
    made = moved(adapter((0, 8), anchored=True))
    adapt_weights(module, on("in_proj_weight", made))
    calls = 0

    def counted(weight: Tensor, blocks: Sequence[Block]) -> Tensor:
        nonlocal calls
        calls += 1
        return effective_weight(weight, blocks)

    monkeypatch.setattr("lowrank.layers.weight.effective_weight", counted)
    module(*[torch.randn(4, 1, 8)] * 3)
    assert calls == 1


def test_a_zero_update_keeps_the_values_in_half_precision() -> None:
    weight = torch.randn(4, 6, 8).to(torch.bfloat16)
    assert torch.equal(effective_weight(weight, [adapter((3, 9), anchored=True).block]), weight)


# -- trained in full --------------------------------------------------------------------------------------


def test_a_trained_module_is_a_copy_beside_the_original() -> None:
    head = nn.Linear(8, 2).requires_grad_(False)
    trained = TrainedModule(head)
    assert trained.out_features == 2 and all(p.requires_grad for p in trained.copy.parameters())
    with torch.no_grad():
        trained.copy.weight.zero_()
    assert trained.weight is trained.copy.weight and head.weight.any()
    trained.acting.names = ()
    assert trained.weight is head.weight
    with pytest.raises(AttributeError, match="nothing"):
        _ = trained.nothing


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 8)])
@pytest.mark.parametrize("make", [nn.Linear, OwnForward])
def test_what_follows_may_write_into_the_output(
    make: type, shape: tuple[int, ...], bias: bool, blocks: int
) -> None:
    rows = [(0, 6)] if blocks == 1 else [(0, 3), (3, 6)]
    layer = layer_over(make(8, 6, bias=bias).requires_grad_(False), *[moved(adapter(each)) for each in rows])
    x, after = torch.randn(shape), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2))
    loss = after(layer(x)).sum()
    loss.backward()
    got = [a.A.grad.clone() for a in layer.part()]
    layer.zero_grad()
    after[0].inplace = False
    after(layer(x)).sum().backward()
    for a, grad in zip(layer.part(), got, strict=True):
        torch.testing.assert_close(grad, a.A.grad)
