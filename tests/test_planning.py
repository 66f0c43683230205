"""A plan is made without touching the model, and wrapping by it gives what wrapping by its policy gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import wrapped


def test_planning_touches_nothing_and_predicts_the_wrapped_model() -> None:
    model, batches = zoo.build("llama"), [zoo.batch("llama")]
    names = [name for name, _ in model.named_modules()]
    plan = lowrank.plan_model(model, presets.tlora(rank=4), batches=batches, progress=False)
    assert [name for name, _ in model.named_modules()] == names
    lowrank.wrap_model(model, presets.tlora(rank=4), batches=batches, progress=False)
    assert lowrank.plan_of(model) == plan
    assert plan.trainable_parameters == sum(p.numel() for p in lowrank.adapter_parameters(model))
    assert plan.trainable_parameters <= 4 * sum(p.out_features for p in plan)


def test_a_plan_wraps_as_its_policy_does(tmp_path: Any) -> None:
    batches = [zoo.batch("llama")]
    policy = presets.tlora(rank=4, seed=3)
    plan = lowrank.plan_model(zoo.build("llama"), policy, batches=batches, progress=False)
    plan.save(tmp_path / "plan.json")
    from_policy = wrapped(policy=policy, batches=batches)
    from_plan = wrapped(policy=lowrank.Plan.load(tmp_path / "plan.json"), batches=batches)
    a, b = from_policy.state_dict(), from_plan.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_plan_for_another_model_lists_every_mismatch() -> None:
    plan = lowrank.plan_model(zoo.build("llama"), presets.lora(target=("q_proj", "up_proj")))
    with pytest.raises(ValueError, match="the plan was made for another model") as raised:
        lowrank.wrap_model(zoo.build("gpt2"), plan)
    missing = [f"{p.name}: the model has no such weight" for p in plan]
    assert len(missing) == 4 and [line.strip() for line in str(raised.value).splitlines()[1:]] == missing


def test_a_fractional_budget_is_of_the_models_parameters() -> None:
    model = zoo.build("llama")
    whole = sum(p.numel() for p in model.parameters())
    plan = lowrank.plan_model(model, presets.lora(budget=0.2))
    assert plan.budget == int(0.2 * whole)
    assert 0.15 * whole < plan.trainable_parameters <= 0.2 * whole


def test_a_sensitive_budget_is_spent_to_within_one_rank() -> None:
    plan = lowrank.plan_model(
        zoo.build("llama"), presets.tlora(budget=4000), batches=[zoo.batch("llama")], progress=False
    )
    assert plan.budget == 4000
    assert 0 <= 4000 - plan.trainable_parameters < max(plan.costs.values())


def test_a_projection_that_the_loss_does_not_reach_is_left_alone() -> None:
    model = zoo.build("deberta")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = model.deberta(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        model.pooler(hidden)  # called, and ignored
        return model.classifier(hidden[:, 0]).square().mean()

    lowrank.wrap_model(
        model, presets.tlora(rank=2), batches=[zoo.batch("deberta")], loss=loss, progress=False
    )
    plan = lowrank.plan_of(model)
    (pooler,) = [p for p in plan if p.module == "pooler.dense"]
    assert plan[pooler].rank == 0
    assert type(model.pooler.dense) is nn.Linear
    assert "left alone" in next(line for line in str(plan).splitlines() if line.startswith("pooler.dense"))


def test_each_projection_draws_for_itself() -> None:
    some = wrapped(policy=presets.lora(target="q_proj", rank=2)).state_dict()
    more = wrapped(policy=presets.lora(rank=2)).state_dict()
    other = wrapped(policy=presets.lora(rank=2, seed=1)).state_dict()
    key = "model.layers.1.self_attn.q_proj.adapters.default.0.A"
    assert torch.equal(some[key], more[key])
    assert not torch.equal(other[key], more[key])


def test_wrapping_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    wrapped(policy=presets.ailora(rank=2))
    wrapped(policy=presets.tlora(rank=2), batches=[zoo.batch("llama")])
    assert torch.equal(torch.get_rng_state(), before)
