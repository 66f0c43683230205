"""The user's own patterns in the plan: which of them is for which projections."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from lowrank import Plan, plan_model, presets, wrap_model
from lowrank.adapters import plan_of
from tests.zoo import build


def names(plan: Plan) -> dict[str, list[str]]:
    return {spelled: [p.module for p in hits] for spelled, hits in plan.matches.items()}


def test_a_plan_says_what_each_pattern_is_for() -> None:
    policy = presets.lora(
        rank=2,
        target=("query", "layers.1*.mlp.*_proj"),
        exclude="gate_proj",
        ranks={"q_proj": 3, "0.self_attn.q_proj": 4},
        alphas={"mlp.*": 8.0},
    )
    plan = plan_model(build("llama"), policy)
    assert names(plan) == {
        "target='query'": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        "target='layers.1*.mlp.*_proj'": ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
        "ranks['q_proj']=3": ["model.layers.1.self_attn.q_proj"],
        "ranks['0.self_attn.q_proj']=4": ["model.layers.0.self_attn.q_proj"],
        "alphas['mlp.*']=8.0": ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
    }
    shown = str(plan)
    assert "target='query': 2 of 4 projections (model.layers.*.self_attn.q_proj (2))" in shown
    assert "ranks['q_proj']=3: 1 of 4 projections (model.layers.1.self_attn.q_proj)" in shown


def test_a_part_of_the_model_keeps_its_spelling() -> None:
    towers = nn.ModuleDict({part: nn.Sequential(nn.Linear(4, 4)) for part in ("vision_tower", "decoder")})
    plan = plan_model(towers, presets.lora(rank=2, target=("vision:all-linear", "decoder.0")))
    assert names(plan) == {
        "target='vision:all-linear'": ["vision_tower.0"],
        "target='decoder.0'": ["decoder.0"],
    }


def test_layers_narrow_what_a_pattern_is_for() -> None:
    plan = plan_model(build("llama"), presets.lora(rank=2, target="q_proj", layers=1))
    assert names(plan) == {"target='q_proj'": ["model.layers.1.self_attn.q_proj"]}


def test_told_roles_and_fused_rows() -> None:
    model = nn.ModuleDict({"theta": nn.Linear(4, 4), "phi": nn.Linear(4, 4)})
    plan = plan_model(model, presets.lora(rank=2, target="query", roles={"theta": "query", "phi": "key"}))
    assert names(plan) == {
        "target='query'": ["theta"], "roles['theta']=query": ["theta"], "roles['phi']=key": [],
    }  # fmt: skip
    assert "roles['phi']=key: none" in str(plan)
    fused = plan_model(build("gpt2"), presets.lora(rank=2, target="value"))
    assert [p.block for p in fused.matches["target='value'"]] == ["value"] * len(fused)


def test_the_default_needs_no_line() -> None:
    plan = plan_model(build("llama"), presets.lora(rank=2))
    assert list(plan.matches) == ["target='all-linear'"] and len(plan.matches["target='all-linear'"]) == len(
        plan
    )
    assert "target=" not in str(plan)


def test_patterns_last_through_json_wrapping_and_copies() -> None:
    plan = plan_model(build("llama"), presets.lora(rank=2, target=("value", "o_proj"), ranks={"o_proj": 1}))
    again = Plan.from_json(plan.to_json())
    assert again.matches == plan.matches and str(again) == str(plan)
    model = wrap_model(build("llama"), again, progress=False)
    assert plan_of(model).matches == plan.matches
    assert copy.deepcopy(plan).matches == plan.matches
    older = plan.to_json()
    del older["matches"]
    assert Plan.from_json(older).matches == {}
    wrong = plan.to_json()
    wrong["matches"]["target='value'"] = [99]
    with pytest.raises(ValueError, match="matches names a projection that is not there; there are 4"):
        Plan.from_json(wrong)
