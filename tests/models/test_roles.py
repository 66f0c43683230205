"""Roles that the user says, and the list of what a plan leaves out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from torch import nn

import lowrank
from lowrank import Plan, Policy, plan_model, presets
from lowrank.models.families import Role
from tests.zoo import build


def model() -> nn.Module:
    """Two mixers with names that say nothing, and a body much larger than they are."""
    mixers = [nn.ModuleDict({"theta": nn.Linear(4, 4), "phi": nn.Linear(4, 4)}) for _ in range(2)]
    return nn.Sequential(OrderedDict(mixers=nn.ModuleList(mixers), body=nn.Linear(4, 4)))


def test_a_role_that_the_user_says_is_a_target_and_in_the_plan() -> None:
    policy = presets.lora(rank=2, target="query", roles={"theta": "query", "1.theta": "key"})
    plan = plan_model(model(), policy)
    assert [(p.module, p.role) for p in plan] == [("mixers.0.theta", Role.QUERY)], (
        "the longest pattern counts"
    )
    assert Policy.from_json(policy.to_json()) == policy
    with pytest.raises(ValueError, match="target='query' matches no projection"):
        plan_model(model(), presets.lora(rank=2, target="query"))


def test_what_the_user_says_goes_before_the_name() -> None:
    found = {
        p.module: p.role for p in lowrank.find_projections(build("llama"), roles={"0.mlp.gate_proj": "up"})
    }
    assert found["model.layers.0.mlp.gate_proj"] == Role.UP
    assert found["model.layers.1.mlp.gate_proj"] == Role.GATE


@pytest.mark.parametrize("roles", [{"theta": "qery"}, {"": "query"}, ["theta"], {"theta": 1}])
def test_a_role_that_is_none_is_refused(roles: Any) -> None:
    with pytest.raises(ValueError, match="roles says the role of each name.*one of query, key, value"):
        Policy(roles=roles)


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="roles='thata' names no projection of one role.*theta"):
        plan_model(model(), presets.lora(rank=2, roles={"thata": "query"}))
    with pytest.raises(ValueError, match="roles='c_attn' names no projection of one role"):
        plan_model(build("gpt2"), presets.lora(rank=2, roles={"c_attn": "query"}))


# -- what is left out ---------------------------------------------------------------------------------


def many_kinds() -> nn.Module:
    """Eight recurrent layers of different names, the last much larger than the others."""
    layers: dict[str, nn.Module] = {f"small_{letter}": nn.LSTM(2, 2) for letter in "abcdefg"}
    layers |= {"body": nn.Linear(4, 4), "wide": nn.GRU(64, 64)}
    return nn.Sequential(OrderedDict(layers))


def test_a_plan_lists_all_that_it_leaves_out_and_says_large_weights_in_its_notes() -> None:
    plan = plan_model(many_kinds(), presets.lora(rank=2))
    assert len(plan.left_out) == 16
    assert set(plan.left_out.values()) == {"no linear layer holds it"}
    assert "wide.weight_ih_l0, wide.weight_hh_l0" in str(plan) and "10 kinds more" in str(plan)
    assert Plan.from_json(plan.to_json()).left_out == plan.left_out


def test_a_target_by_name_leaves_nothing_out() -> None:
    assert plan_model(many_kinds(), presets.lora(rank=2, target="body")).left_out == {}
    excluded = presets.lora(rank=2, exclude=("wide", *(f"small_{letter}" for letter in "abcdefg")))
    assert plan_model(many_kinds(), excluded).left_out == {}
