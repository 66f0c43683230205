"""A learning rate that is measured for an adapter, and kept in its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank
from lowrank import Plan, presets
from lowrank.train import fit
from lowrank.train.rate import measured_rate, turning_steps
from tests.helpers import wrapped


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    return lowrank.wrap_model(model, presets.lora(rank=2, target=("0",), **options), progress=False)


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=draw), torch.randn(4, 2, generator=draw)) for _ in range(3)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def test_the_plan_keeps_what_fit_would_measure(tmp_path: Path) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    assert lowrank.plan_of(model).learning_rate is None and "learning rate" not in str(lowrank.plan_of(model))
    rate = lowrank.plan_learning_rate(model, batches(), loss)
    assert all(map(torch.equal, model.parameters(), before))
    plan = lowrank.plan_of(model)
    assert plan.learning_rate == rate and f"\nlearning rate {rate:.2e}, measured" in str(plan)
    assert fit(model, batches(), loss, lr="auto", progress=False).learning_rate == rate

    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.learning_rate == rate and loaded == plan
    again = lowrank.wrap_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), loaded, progress=False)
    assert lowrank.plan_of(again).learning_rate == rate
    lowrank.save_adapter(model, tmp_path / "adapter")
    other = lowrank.load_adapter(network_base(), tmp_path / "adapter")
    assert lowrank.plan_of(other).learning_rate == rate


def network_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))


def test_modules_trained_in_full_stay_where_they_are() -> None:
    """Their curvature does not count: the rate is that without them."""
    assert lowrank.plan_learning_rate(network(train=("1",)), batches(), loss) == pytest.approx(
        lowrank.plan_learning_rate(network(), batches(), loss), rel=1e-3
    )


def test_the_rate_is_for_a_run_of_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.train.rate.HIGHEST", float("inf"))
    model = network()
    long, run = (lowrank.plan_learning_rate(model, batches(), loss, steps=n) for n in (400, len(batches())))
    assert long == pytest.approx(lowrank.plan_learning_rate(model, batches(), loss) * (250 / 400) ** 0.5)
    assert run == fit(model, batches(), loss, lr="auto", progress=False).learning_rate > long
    with pytest.raises(ValueError, match="steps: expected a positive number, got 0"):
        lowrank.plan_learning_rate(model, batches(), loss, steps=0)


def test_of_several_adapters_the_named_one_acts_alone() -> None:
    model = network()
    alone = lowrank.plan_learning_rate(model, batches(), loss)
    lowrank.add_adapter(model, presets.lora(rank=2, target=("1",)), name="other", progress=False)
    with torch.no_grad():
        for p in lowrank.adapter_parameters(model, "other"):
            p.add_(1.0)
    lowrank.set_adapters(model, "other")
    assert lowrank.plan_learning_rate(model, batches(), loss, name="default") == pytest.approx(
        alone, rel=1e-3
    )
    assert lowrank.plan_of(model, "other").learning_rate is None
    with pytest.raises(ValueError, match="several adapters, so name one of them: default, other"):
        lowrank.plan_learning_rate(model, batches(), loss)


def test_a_language_model_gets_a_rate_that_trains_it() -> None:
    from tests import zoo

    model = wrapped("llama")
    data = [zoo.batch("llama", seed=seed) for seed in range(2)]
    rate = lowrank.plan_learning_rate(model, data)
    history = fit(model, data, lr=rate, epochs=20, progress=False)
    assert 1e-5 < rate < 1 and history.losses[-1] < history.losses[0]


def test_lora_plus_is_measured_along_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A has 12 numbers and B 16. Only B has a gradient at first: it moves by 16 / mean, and the loss turns
    that much sooner."""
    monkeypatch.setattr("lowrank.train.rate.HIGHEST", float("inf"))
    model, mean = network(), 16 ** (16 / 28)
    groups = lowrank.lora_plus(model)
    alone, turns = (turning_steps(model, batches(), loss, parameters=each) for each in (None, groups))
    assert turns.curved == pytest.approx(alone.curved * mean / 16, rel=1e-2)
    history = fit(model, batches(), loss, lr="auto", parameters=groups, progress=False)
    rate = history.learning_rate
    assert rate == pytest.approx(measured_rate(turns, len(history)) / mean, rel=1e-6)
    for options in ((), (rate,)):
        model = network()
        groups = lowrank.lora_plus(model, *options)
        again = fit(model, batches(), loss, lr=rate, parameters=groups, progress=False)
        assert again.losses == history.losses


def test_what_cannot_be_measured() -> None:
    model = network()
    for p in lowrank.adapter_parameters(model):
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="the adapter 'default' is frozen: set requires_grad"):
        lowrank.plan_learning_rate(model, batches(), loss)
    with pytest.raises(ValueError, match="not wrapped"):
        lowrank.plan_learning_rate(nn.Linear(2, 2), batches(), loss)
    plan = lowrank.plan_of(network())
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="learning_rate: expected a positive number"):
            Plan(plan, learning_rate=bad)
