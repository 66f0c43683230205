"""One adapter made of several: the weighted sum, exactly or by the best approximation of a rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import logits

SHARES = {"a": 0.7, "b": -0.3}


def pair(family: str = "llama") -> nn.Module:
    """A plain adapter "a" on everything and an anchored one "b", both moved."""
    model = zoo.build(family)
    for name, policy in (
        ("a", presets.lora(rank=2)),
        ("b", presets.pissa(rank=3, target=("query", "value"))),
    ):
        lowrank.add_adapter(model, policy, name=name, progress=False)
        with torch.no_grad():
            for parameter in lowrank.adapter_parameters(model, name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def delta(layer: Any, shares: dict[str, float]) -> Tensor:
    total = torch.zeros(layer.out_features, layer.in_features)
    for name, share in shares.items():
        if name in layer.adapters:
            total += share * layer.delta_weight(name)
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2", "torch_encoder", "bert"])
def test_the_exact_sum(family: str, tmp_path: Path) -> None:
    model, batch = pair(family), zoo.batch(family)
    before = logits(model, batch)
    lowrank.set_adapters(model, SHARES)
    wanted = logits(model, batch)
    lowrank.set_adapters(model, "a")
    assert lowrank.combine_adapters(model, SHARES, name="sum") is model
    assert lowrank.adapter_names(model) == ["a", "b", "sum"]
    assert torch.equal(logits(model, batch), before), "it acts before it is chosen"
    lowrank.set_adapters(model, "sum")
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-4, atol=1e-5)
    plan = lowrank.plan_of(model, "sum")
    assert plan.notes == ("combined from {a: 0.7, b: -0.3}",)
    assert sum(p.numel() for p in lowrank.adapter_parameters(model, "sum")) == plan.trainable_parameters
    lowrank.save_adapter(model, tmp_path, "sum")
    lone = lowrank.load_adapter(zoo.build(family), tmp_path)
    assert torch.equal(logits(lone, batch), logits(model, batch)) and lowrank.plan_of(lone) == plan


def test_ranks_add_up_and_an_anchor_counts_twice() -> None:
    model = lowrank.combine_adapters(pair(), SHARES, name="sum")
    ranks = {
        p.module.rpartition(".")[2]: allocation.rank
        for p, allocation in lowrank.plan_of(model, "sum").items()
    }
    assert ranks["q_proj"] == 2 + 2 * 3 and ranks["up_proj"] == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_the_best_approximation_of_a_rank(rank: int) -> None:
    model = lowrank.combine_adapters(pair(), SHARES, name="near", rank=rank)
    left_out = whole = worst = 0.0
    for path, layer in lowrank.adapted_layers(model).items():
        exact = delta(layer, SHARES).double()
        values = torch.linalg.svdvals(exact).square()
        error = (layer.delta_weight("near").double() - exact).square().sum()
        torch.testing.assert_close(error, values[rank:].sum(), rtol=1e-3, atol=1e-9)
        left_out, whole = left_out + values[rank:].sum(), whole + values.sum()
        worst = max(worst, float(values[rank:].sum() / values.sum()))
        assert layer.part("near").held()[0].rank == min(
            rank, 8 if "q_proj" in path or "v_proj" in path else 2
        )
    origin, note = lowrank.plan_of(model, "near").notes
    assert origin == "combined from {a: 0.7, b: -0.3}"
    said = [float(word) for word in note.replace(",", "").split() if "e-" in word]
    assert said == pytest.approx([math.sqrt(left_out / whole), math.sqrt(worst)], rel=1e-2)


def test_blocks_and_whole_weights_of_fused_layers() -> None:
    """One adapter has the rows of the query, another those of the key and value, a third all of them."""
    model = zoo.build("gpt2")
    for name, policy in (
        ("q", presets.lora(rank=2, target="query")),
        ("kv", presets.lora(rank=1, target=("key", "value"))),
    ):
        lowrank.add_adapter(model, policy, name=name, progress=False)
    p = next(iter(lowrank.plan_of(model, "q").adapted))
    whole = lowrank.Projection(p.module, "weight", (16, 80), lowrank.Role.OTHER, 32, 64)
    plan = lowrank.Plan({whole: lowrank.Allocation(3, 0.5)})
    lowrank.add_adapter(model, plan, name="across", progress=False)
    with torch.no_grad():
        for parameter in lowrank.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    lowrank.combine_adapters(model, ["q", "kv"], name="apart")
    assert {each.rows for each in lowrank.plan_of(model, "apart").adapted} == {(0, 32), (32, 64), (64, 96)}
    lowrank.combine_adapters(model, {"q": 1, "kv": 2, "across": -1}, name="mixed")
    joined = [each for each in lowrank.plan_of(model, "mixed").adapted if each.module == p.module]
    assert [each.name for each in joined] == [p.module] and joined[0].rows == (0, 96)
    layer = lowrank.adapted_layers(model)[p.module]
    torch.testing.assert_close(layer.delta_weight("apart"), delta(layer, {"q": 1, "kv": 1}))
    torch.testing.assert_close(layer.delta_weight("mixed"), delta(layer, {"q": 1, "kv": 2, "across": -1}))


def test_more_than_a_weight_can_hold() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    for name in ("a", "b", "c"):
        lowrank.add_adapter(model, presets.lora(rank=3), name=name, progress=False)
        with torch.no_grad():
            for parameter in lowrank.adapter_parameters(model, name):
                parameter.add_(torch.randn_like(parameter))
    lowrank.combine_adapters(model, ["a", "b", "c"], name="sum")
    assert model[0].part("sum").held()[0].rank == 4
    torch.testing.assert_close(model[0].delta_weight("sum"), delta(model[0], dict.fromkeys("abc", 1.0)))


def test_what_cannot_be_combined() -> None:
    model = zoo.build("bert")
    lowrank.add_adapter(model, presets.lora(rank=2, train=("classifier",)), name="a", progress=False)
    lowrank.add_adapter(model, presets.lora(rank=2), name="b", progress=False)
    for options, message in (
        ({"weights": ["a", "b"], "name": "c"}, "'a' trains classifier in full"),
        ({"weights": ["b"], "name": "a"}, "has an adapter 'a' already"),
        ({"weights": ["x"], "name": "c"}, "no adapter 'x'"),
        ({"weights": [], "name": "c"}, "expected the adapters to combine"),
        ({"weights": {"b": float("nan")}, "name": "c"}, "expected a finite number"),
        ({"weights": ["b"], "name": "c", "rank": 0}, "expected a rank of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            lowrank.combine_adapters(model, **options)
    assert lowrank.adapter_names(model) == ["a", "b"]
