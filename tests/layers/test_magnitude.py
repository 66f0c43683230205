"""DoRA: the start is exact, values and gradients are the paper's, and a merged model computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5, bias=bias)).double()


def by_the_paper(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 5 with the norm detached (eq. 11): y and the leaves m, A, B."""
    (adapter,) = layer.part().held()
    m = adapter.magnitude.values().detach().requires_grad_()
    A, B = (factor.detach().requires_grad_() for factor in (adapter.A, adapter.B))
    A0, B0 = (adapter.A0, adapter.B0) if adapter.anchored else (0 * A, 0 * B)
    V = layer.base.weight + adapter.scaling * ((B0 + B) @ (A0 + A) - B0 @ A0)
    W = m[:, None] * V / V.norm(dim=1, keepdim=True).detach()
    return nn.functional.linear(x, W, layer.base.bias), m, A, B


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("preset", [presets.lora, presets.pissa], ids=["lora", "pissa"])
def test_output_and_gradients_are_the_papers(preset: Any, bias: bool) -> None:
    model = perturb(lowrank.wrap_model(network(bias), preset(rank=2, dora=True)))
    layer: Any = model[0]
    x = torch.randn(7, 6, dtype=torch.float64)
    y = model(x)
    wanted, *leaves = by_the_paper(layer, x)
    torch.testing.assert_close(y, wanted)
    dY = torch.randn_like(y)
    y.backward(dY)
    grads = torch.autograd.grad(wanted, leaves, dY)
    (adapter,) = layer.part().held()
    for got, grad in zip((adapter.magnitude.offset, adapter.A, adapter.B), grads, strict=True):
        torch.testing.assert_close(got.grad, grad)
    torch.testing.assert_close(
        layer.delta_weight() + layer.base.weight, torch.autograd.functional.jacobian(model, x[0])
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_merging_gives_the_same_outputs(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family), zoo.batch(family)
    base = frozen_logits(model, batch)
    lowrank.wrap_model(model, presets.dora(rank=2, target=("query", "value")), progress=False)
    assert torch.equal(logits(model, batch), base)
    trained = logits(perturb(model), batch)
    assert (trained - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(lowrank.merge(model), batch), trained, rtol=1e-4, atol=1e-4)


def test_another_adapter_is_merged_below_magnitudes_that_stay() -> None:
    model = zoo.build("llama")
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), name="one", progress=False))
    lowrank.add_adapter(model, presets.dora(rank=2), name="two", progress=False)
    lowrank.merge(model, "one")
    lowrank.set_adapters(model, "two")
    layer: Any = next(iter(lowrank.adapted_layers(model).values()))
    (adapter,) = layer.part().held()
    torch.testing.assert_close(adapter.magnitude.norms, layer.base.weight.norm(dim=1))


def test_magnitudes_are_not_mixed() -> None:
    model = lowrank.wrap_model(zoo.build("llama"), presets.dora(rank=2), name="one", progress=False)
    lowrank.add_adapter(model, presets.lora(rank=2), name="two", progress=False)
    for names, message in (
        ({"one": 0.5}, "expected weight 1, got 0.5"),
        (("one", "two"), "only one of them can act"),
    ):
        with pytest.raises(ValueError, match=message):
            lowrank.set_adapters(model, names)
    with pytest.raises(ValueError, match="cannot be added up"):
        lowrank.combine_adapters(model, ("one", "two"), name="both")
    with (
        pytest.raises(ValueError, match="cannot act on some examples"),
        lowrank.adapters_for_rows(model, ["one"]),
    ):
        pass
    lowrank.set_adapters(model, "two")


def test_a_budget_pays_for_the_magnitudes() -> None:
    plan = lowrank.plan_model(zoo.build("llama"), presets.dora(budget=6000))
    magnitudes = sum(p.out_features for p in plan.adapted)
    ranks = sum(plan[p].rank * sum(p.shape) for p in plan.adapted)
    assert plan.trainable_parameters == magnitudes + ranks <= 6000
    assert lowrank.Plan.from_json(plan.to_json()) == plan and plan.dora
    with pytest.raises(ValueError, match=f"magnitudes alone take {magnitudes:,}"):
        lowrank.plan_model(zoo.build("llama"), presets.dora(budget=magnitudes))


def test_lora_fa_trains_b_alone() -> None:
    model = lowrank.wrap_model(network(), presets.lora_fa(rank=2))
    start = lowrank.wrap_model(network(), presets.lora(rank=2))
    (adapter,), (other,) = (each[0].part().held() for each in (model, start))
    assert torch.equal(adapter.A, other.A) and list(lowrank.adapter_parameters(model)) == [adapter.B]
    assert lowrank.plan_of(model).trainable_parameters == adapter.B.numel()
