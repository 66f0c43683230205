"""A layer is replaced wherever its model holds it, and put back: containers, partials, bound methods."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.layers import LoRALinear
from tests.helpers import perturb

Pair = namedtuple("Pair", "first second")


def scaled(layer: nn.Module, x: Tensor, *, then: nn.Module) -> Tensor:
    return then(layer(x))


# How a model holds its layers a and b, and how it calls what it holds.
KINDS: dict[str, tuple[Callable[[nn.Module, nn.Module], Any], Callable[[Any, Tensor], Tensor]]] = {
    "dict of lists": (lambda a, b: {"x": [a], "y": [b]}, lambda h, x: h["y"][0](h["x"][0](x))),
    "list of dicts of lists": (lambda a, b: [{"z": [[a], b]}], lambda h, x: h[0]["z"][1](h[0]["z"][0][0](x))),
    "ordered": (lambda a, b: OrderedDict(a=[a], b=(b,)), lambda h, x: h["b"][0](h["a"][0](x))),
    "defaultdict": (lambda a, b: defaultdict(list, a=[a, b]), lambda h, x: h["a"][1](h["a"][0](x))),
    "tuple of lists": (lambda a, b: ([a], ((b,),)), lambda h, x: h[1][0][0](h[0][0](x))),
    "named tuple": (lambda a, b: [Pair(a, (b,))], lambda h, x: h[0].second[0](h[0].first(x))),
    "set": (lambda a, b: [{a}, frozenset({b})], lambda h, x: next(iter(h[1]))(next(iter(h[0]))(x))),
    "keys": (lambda a, b: {a: 1.0, b: 2.0}, lambda h, x: (lambda a, b: b(a(x)))(*h)),
    "partial": (lambda a, b: partial(scaled, a, then=b), lambda h, x: h(x)),
    "partial of the layer": (lambda a, b: [partial(a), partial(b)], lambda h, x: h[1](h[0](x))),
    "partial of a partial": (lambda a, b: partial(partial(scaled, a), then=b), lambda h, x: h(x)),
    "bound method": (lambda a, b: [a.forward, b.__call__], lambda h, x: h[1](h[0](x))),
    "partial of a bound method": (
        lambda a, b: {0: [partial(a.forward)], 1: b.forward},
        lambda h, x: h[1](h[0][0](x)),
    ),
}


class Holder(nn.Module):
    """Calls its layers by way of a plain attribute alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        make, self.run = KINDS[kind]
        self.held = make(self.a, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.held, x)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_replaced_where_they_are_held_and_put_back(kind: str) -> None:
    model, x = Holder(kind).requires_grad_(False), torch.randn(2, 4)
    base, a, b = model(x), model.a, model.b
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False), 1.0)
    torch.testing.assert_close(model(x), model.b(model.a(x)))
    assert not torch.allclose(model(x), base, atol=1e-3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in lowrank.adapter_parameters(model))
    lowrank.unwrap(model)
    assert torch.equal(model(x), base) and model.a is a and model.b is b
    with torch.no_grad():
        b.weight.zero_()
    assert torch.equal(model(x), b.bias.expand(2, 4)), "it does not call the original layer"


def test_what_a_model_holds_may_hold_itself() -> None:
    model = Holder("dict of lists")
    model.held["itself"], model.ring = model.held, [model.a]
    model.ring.append(model.ring)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert isinstance(model.held["itself"]["x"][0], LoRALinear) and model.ring[0] is model.a
    assert model.held["itself"] is model.held and model.ring[1] is model.ring


def test_what_holds_no_layer_stays_the_very_object() -> None:
    model = Holder("dict of lists")
    model.plain = (1, [2, {3}], partial(int, "7"), (4.0,), torch.Size((2, 3)), frozenset("ab"), "text".upper)
    before = model.plain
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert model.plain is before


def test_a_method_that_the_layer_does_not_have_stays_with_the_original() -> None:
    class Named(nn.Linear):
        def name(self) -> str:
            return "mine"

    model = nn.Sequential(Named(4, 4), nn.Linear(4, 4))
    model.method = model[0].name
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert isinstance(model[0], LoRALinear) and model.method() == "mine"


def test_a_layer_may_hold_its_own_method() -> None:
    """As accelerate and others do, who keep a layer's original forward on the layer."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    layer = model[0]
    layer.original = layer.forward
    layer.forward = partial(lambda layer, x: 2 * layer.original(x), layer)
    base = model(x).detach()
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    torch.testing.assert_close(model(x), base)
    assert layer.original.__self__ is layer and layer.forward.args == (layer,)
