"""Ranks of experts, divided by the number of experts that act on a token."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import lowrank
from lowrank import Policy, allocate, presets
from tests.helpers import frozen_logits, logits
from tests.layers.test_experts import batch, build


def plan(model: nn.Module, **options: Any) -> lowrank.Plan:
    return lowrank.plan_model(model, presets.lora(rank=8, alpha=16, **options))


@pytest.mark.parametrize(("name", "active"), [("mixtral", 2), ("gpt_oss", 2), ("llama4", 1), ("olmoe", 2)])
def test_the_rank_of_experts_is_divided(name: str, active: int) -> None:
    whole, made = plan(build(name)), plan(build(name), expert_rank="rank/active")
    for p, allocation in made.items():
        n = active if p.param != "weight" else 1
        assert (allocation.rank, allocation.scaling) == (8 // n, whole[p].scaling * n)
    assert f"the rank is divided by {active} active experts" in str(made)
    assert made == lowrank.Plan.from_json(made.to_json())


def test_it_starts_at_the_base() -> None:
    policy = presets.pissa(rank=4, expert_rank="rank/active")
    model = lowrank.wrap_model(build("qwen3_moe"), policy, progress=False)
    assert {a.rank for p, a in lowrank.plan_of(model).items() if p.param != "weight"} == {2}
    base = frozen_logits(build("qwen3_moe"), batch())
    assert (logits(model, batch()) - base).abs().max() < 1e-5


def test_a_rank_is_at_least_1_and_a_rank_by_name_goes_before() -> None:
    made = plan(build("mixtral"), expert_rank="rank/active", ranks={"down": 5}, alphas={"up": 32})
    for p, allocation in made.items():
        wanted = {"down": (5, 16 / 5), "up": (4, 8.0), "gate": (4, 4.0)}.get(p.role.value, (8, 2.0))
        assert (allocation.rank, allocation.scaling) == wanted
    least = lowrank.plan_model(build("mixtral"), presets.lora(rank=1, expert_rank="rank/active"))
    assert {allocation.rank for allocation in least.values()} == {1}


def test_other_allocators_and_scalings() -> None:
    options = {"scaling": "alpha/sqrt(r)", "allocate": allocate.Uniform()}
    made = plan(build("mixtral"), expert_rank="rank/active", **options)
    assert {round(a.scaling, 6) for p, a in made.items() if p.param != "weight"} == {8.0}


class Listed(nn.Module):
    """Experts that are modules of their own; nothing says how many act."""

    def __init__(self, top_k: int | None) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        if top_k:
            self.block.top_k = top_k


def test_experts_that_are_modules() -> None:
    assert {a.rank for a in plan(Listed(4), expert_rank="rank/active").values()} == {2}
    with pytest.raises(ValueError, match=r"block.experts.0: no config.num_experts_per_tok .* ranks="):
        plan(Listed(None), expert_rank="rank/active")


def test_the_policy_says_what_it_takes() -> None:
    policy = Policy(expert_rank="rank/active")
    assert Policy.from_json(policy.to_json()) == policy
    with pytest.raises(ValueError, match='expert_rank: expected "rank" or "rank/active", got \'active\''):
        Policy(expert_rank="active")
    with pytest.raises(ValueError, match="does not go with a budget"):
        Policy(expert_rank="rank/active", budget=1000)
