"""Roles that the user says, and the list of what a plan leaves out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    with pytest.raises(ValueError, match="roles: expected a role by name.*one of query, key, value"):
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


# -- structure ------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """act(first) · second, or first · act(second): names say nothing of which is the gate."""

    def __init__(self, bent: str, activation: Any = nn.functional.silu) -> None:
        super().__init__()
        self.alpha, self.beta, self.omega = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.bent, self.activation = bent, activation

    def forward(self, x: Tensor) -> Tensor:
        parts = {"alpha": self.alpha(x), "beta": self.beta(x)}
        parts[self.bent] = self.activation(parts[self.bent])
        return self.omega(parts["alpha"] * parts["beta"])


def roles(block: nn.Module) -> dict[str, str]:
    found = lowrank.find_projections(nn.ModuleDict({"block": block}))
    return {p.module.removeprefix("block."): p.role.value for p in found}


@pytest.mark.parametrize("activation", [nn.functional.silu, nn.functional.gelu, torch.sigmoid, torch.relu])
@pytest.mark.parametrize("bent", ["alpha", "beta"])
def test_gate_and_up_are_told_by_which_is_bent(bent: str, activation: Any) -> None:
    class Block(Gated):  # a class of its own: a trial is made once for each
        pass

    other = {"alpha": "beta", "beta": "alpha"}[bent]
    assert roles(Block(bent, activation)) == {bent: "gate", other: "up", "omega": "down"}


def test_a_block_that_widens_and_narrows_has_an_up_and_a_down() -> None:
    def block(*sizes: tuple[int, int]) -> nn.Module:
        return nn.ModuleDict({f"part_{i}": nn.Linear(*each) for i, each in enumerate(sizes)})

    assert roles(block((4, 8), (8, 4))) == {"part_0": "up", "part_1": "down"}
    assert set(roles(block((4, 8), (8, 8))).values()) == {"other"}, "a projector"
    assert set(roles(block((8, 4), (4, 8))).values()) == {"other"}, "a bottleneck"
    named = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))})
    assert list(roles(named).values()) == ["up", "down"], "the name says that it is a feed-forward block"
    branches = block((4, 8), (4, 8), (8, 4))
    assert set(roles(branches).values()) == {"other"}, "nothing shows a gate"
    attention = nn.ModuleDict({"attention": block((4, 8), (8, 4))})
    assert {p.role for p in lowrank.find_projections(attention)} == {Role.OTHER}


def test_the_layer_that_narrows_is_the_down_wherever_it_is_kept() -> None:
    class Lumina(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_1, self.linear_2 = nn.Linear(6, 10), nn.Linear(10, 6)
            self.linear_3 = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear_2(nn.functional.silu(self.linear_1(x)) * self.linear_3(x))

    assert roles(Lumina()) == {"linear_1": "gate", "linear_2": "down", "linear_3": "up"}


def test_a_router_without_experts_beside_it_is_left_out() -> None:
    mixture = nn.ModuleDict({"router": nn.ModuleDict({"layer": nn.Linear(4, 2)}), "body": nn.Linear(4, 4)})
    plan = plan_model(nn.ModuleDict({"mlp": mixture}), presets.lora(rank=2))
    assert [p.module for p in plan] == ["mlp.body"]
    assert plan.left_out == {"mlp.router.layer": "it chooses experts"}
