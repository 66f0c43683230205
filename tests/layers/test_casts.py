"""Factors that are cast for all layers at once: the same numbers, one operation a pass, never out of date."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import Policy, presets
from lowrank.adapters import adapters_of
from lowrank.layers import casts
from tests import zoo
from tests.helpers import perturb

POLICIES = {name: getattr(presets, name)(rank=2) for name in ("lora", "pissa", "olora")}
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES, autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU, where a cast costs little, they are off: here they are on."""
    monkeypatch.setattr(casts, "DEVICES", frozenset({"cpu", "cuda"}))
    return str(request.param)


class Count(TorchDispatchMode):
    """How often an operation is dispatched, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def net(policy: Policy, device: str, layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).bfloat16().to(device)
    perturb(lowrank.wrap_model(made, policy, progress=False))
    return made


def inputs(device: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 16, dtype=torch.bfloat16, device=device)


def trained(model: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """The factors after some steps, which write through .data as some optimizers do."""
    held = lowrank.adapter_parameters(model)
    for _ in range(steps):
        model(x).float().square().mean().backward()
        for each in held:
            assert each.grad is not None
            each.data -= 0.1 * each.grad
            each.grad = None
    return [each.detach().clone() for each in held]


@pytest.mark.parametrize("preset", POLICIES)
def test_training_is_bit_for_bit_what_it_is_without(
    preset: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs(device)
    with_casts = trained(net(POLICIES[preset], device), x)
    monkeypatch.setattr(casts, "DEVICES", frozenset())
    without = trained(net(POLICIES[preset], device), x)
    assert all(map(torch.equal, with_casts, without))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "llama"])
def test_fused_weights_too(family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        model = zoo.build(family).bfloat16().to(device).train()
        lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
        optimizer = torch.optim.SGD(lowrank.adapter_parameters(model), lr=1.0)
        found = []
        for _ in range(3):
            torch.manual_seed(0)
            loss = model(**{name: each.to(device) for name, each in zoo.batch(family).items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    with_casts = losses()
    monkeypatch.setattr(casts, "DEVICES", frozenset())
    assert with_casts == losses()
    assert with_casts[0] != with_casts[2]


@pytest.mark.parametrize(("preset", "calls"), [("lora", 1), ("pissa", 2)])
def test_one_operation_casts_for_all_layers(preset: str, calls: int, device: str) -> None:
    model, x = net(POLICIES[preset], device, layers=5), inputs(device)
    trained(model, x, steps=1)
    with Count() as count:
        loss = model(x).float().square().mean()
    assert count.calls.get("_foreach_copy_") == calls
    assert count.calls.get("_to_copy") == 1  # of the loss
    with Count() as again:  # as for a second loss on the same weights
        loss = loss + model(x).float().square().mean()
    assert "_foreach_copy_" not in again.calls
    loss.backward()


def test_what_is_written_is_seen(device: str) -> None:
    model, x = net(POLICIES["lora"], device), inputs(device)
    first = model(x)
    adapter = next(iter(adapters_of(model).values()))
    with torch.no_grad():
        adapter.B.zero_()
    second = model(x)
    assert not torch.equal(first, second)
    adapter.B = nn.Parameter(adapter.B.detach() + 1)
    third = model(x)
    assert not torch.equal(second, third)
    third.float().sum().backward()
    assert adapter.B.grad is not None


def test_nothing_is_held_after_a_pass(device: str) -> None:
    model, x = net(POLICIES["pissa"], device), inputs(device)
    trained(model, x, steps=2)
    (held,) = {id(layer.acting.casts): layer.acting.casts for layer in model}.values()  # type: ignore[union-attr]
    assert len(held._held) == 3
    assert all(each.low is None and each.high is None for each in held._held.values())


def test_a_copy_of_a_model_has_its_own(device: str) -> None:
    model, x = net(POLICIES["lora"], device), inputs(device)
    before = model(x)
    other = copy.deepcopy(model)
    trained(other, x)
    assert other[0].acting.casts is other[1].acting.casts is not model[0].acting.casts  # type: ignore[union-attr]
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)


def test_recomputed_activations(device: str) -> None:
    grads = []
    for recomputed in (False, True):
        model, x = net(POLICIES["lora"], device), inputs(device).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
        y.float().square().mean().backward()
        grads.append([each.grad for each in lowrank.adapter_parameters(model)])
    assert all(map(torch.equal, *grads))


def test_factors_of_another_owner_are_cast_for_themselves(device: str) -> None:
    """As in torch.func.functional_call, and for a mixture, whose weight is in B."""
    model, x = net(POLICIES["lora"], device), inputs(device)
    model(x).float().sum().backward()
    others = {name: torch.zeros_like(each) for name, each in model.named_parameters() if name.endswith(".B")}
    called = torch.func.functional_call(model, others, (x,))
    with torch.no_grad(), lowrank.disable_adapters(model):
        wanted = model(x)
    torch.testing.assert_close(called, wanted)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()
