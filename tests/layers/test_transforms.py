"""`torch.func`, forward mode and second derivatives through an adapted layer: right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lowrank.layers import Adapter, LoRALinear
from tests.helpers import numbers

# PyTorch's own decompositions for forward mode, and its compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class Called(nn.Linear):
    """A base with a forward of its own, which is called."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 + F.linear(x, self.weight, self.bias)


BASES = {"fused": nn.Linear, "called": Called}
ROWS = {"whole": [(0, 6)], "blocks": [(0, 2), (3, 6)], "interleaved": [(0, 4, 1, 3), (1, 6, 2, 3)]}


def pair(base: str, rows: str, anchored: bool) -> tuple[LoRALinear, Any, Tensor]:
    """A moved layer 8 → 6 in fp64, the same function from ordinary operations, and an input (4, 8)."""
    adapters = []
    for own in ROWS[rows]:
        B = torch.randn(len(numbers(own)), 2) * anchored
        adapters.append(Adapter(torch.randn(2, 8), B, 0.5, rows=own, dtype=torch.float64))
    made = BASES[base](8, 6).double().requires_grad_(False)
    layer = LoRALinear(made, adapters, in_features=8, out_features=6)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    weight = made.weight + layer.delta_weight()
    return layer, lambda x: F.linear(x, weight, made.bias), torch.randn(4, 8).double()


@pytest.fixture(params=[(b, r, a) for b in BASES for r in ROWS for a in (False, True)], ids=str)
def case(request: Any) -> tuple[LoRALinear, Any, Tensor]:
    return pair(*request.param)


def scalar(run: Any) -> Any:
    return lambda x: run(x).sin().sum()


def test_the_transforms_of_torch_func(case: Any) -> None:
    layer, plain, x = case
    tangent = torch.randn_like(x)
    for transform in (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.grad(scalar(f))(x),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f)))(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.vjp(f, x)[1](f(x))[0],
        lambda f: torch.func.hessian(scalar(f))(x),
        lambda f: torch.func.jacrev(f)(x),
    ):
        torch.testing.assert_close(transform(layer), transform(plain))


def test_gradients_of_each_example(case: Any) -> None:
    layer, _, x = case
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x[None],)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        layer.zero_grad()
        layer(x[i : i + 1]).sin().sum().backward()
        for name, gradient in each.items():
            torch.testing.assert_close(gradient[i], layer.get_parameter(name).grad)


def test_its_weight_as_others_read_it(case: Any) -> None:
    layer, plain, x = case
    read = lambda x: F.linear(x, layer.weight, layer.bias)  # noqa: E731
    for transform in (torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(transform(scalar(read))(x), transform(scalar(plain))(x))


def test_forward_mode(case: Any) -> None:
    layer, plain, x = case
    tangents = []
    for run in (layer, plain):
        with forward_ad.dual_level():
            y = run(forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


def test_a_second_derivative_is_refused_in_plain_words(case: Any) -> None:
    layer, plain, x = case
    x.requires_grad_()
    for run in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(scalar(run)(x), leaves, create_graph=True)
        torch.testing.assert_close(grads[0], torch.autograd.grad(scalar(plain)(x), x)[0])
        with pytest.raises(RuntimeError, match=r"can be differentiated once.*torch\.func"):
            grads[1].sum().backward()


def test_compiled_transforms() -> None:
    torch.compiler.reset()
    layer, plain, x = pair("fused", "whole", True)
    compiled = torch.compile(
        lambda x: torch.func.vmap(torch.func.grad(scalar(layer)))(x), backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), torch.func.grad(scalar(plain))(x))


def test_dropout_in_a_map_draws_for_each_example() -> None:
    layer, plain, x = pair("fused", "whole", False)
    layer.train().part().dropout = 0.5
    run = torch.func.vmap(lambda x: layer(x), randomness="different")
    many = torch.stack([run(x).detach() for _ in range(4000)])
    torch.testing.assert_close(many.mean(0), plain(x), rtol=0, atol=6 * float(many.std(0).max()) / 4000**0.5)
