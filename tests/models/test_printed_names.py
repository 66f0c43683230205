"""Whatever name a plan or an error prints is a name that a policy takes back."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import Plan, Policy, plan_model
from lowrank.models.patterns import matches, matches_label, parts, starred
from tests.zoo import build

FAMILIES = ["gpt2", "neox", "mixtral", "torch_encoder", "llama"]
KINDS = [(family, "each") for family in FAMILIES] + [("mixtral", "shared")]


@cache
def model(family: str) -> nn.Module:
    return build(family)


def plan(family: str, **options: Any) -> Plan:
    return plan_model(model(family), Policy(**{"rank": 1, **options}))


def ends(name: str) -> list[str]:
    """The name as printed, and without what is before its weight or its module."""
    return list(dict.fromkeys(".".join(parts(name)[-count:]) for count in (99, 3, 1)))


@pytest.mark.parametrize(("family", "experts"), KINDS)
def test_a_projections_name_is_a_target_an_exclusion_and_a_key(family: str, experts: str) -> None:
    every = plan(family, experts=experts)
    labelled = {p.path: p for p in every if p.block}
    for p in list(labelled.values())[:2] or list(every)[:1]:
        for name in ends(p.name):
            chosen = plan(family, experts=experts, target=name)
            assert p in chosen and {(q.param, q.block) for q in chosen} == {(p.param, p.block)}
            assert chosen.matches[f"target={name!r}"] == tuple(chosen)
            assert set(plan(family, experts=experts, exclude=name)) == set(every) - set(chosen)
            given = plan(family, experts=experts, ranks={name: 2}, alphas={name: 3.0})
            assert {q for q in given if given[q].rank == 2 and given[q].scaling == 1.5} == set(chosen)
            told = plan(family, experts=experts, roles={name: "other"})
            assert {q.name for q in told if q.role.value == "other"} == {q.name for q in chosen}


def test_a_label_takes_patterns_and_other_patterns_stay() -> None:
    names = {p.name for p in plan("mixtral", target="layers.*.mlp.experts.gate_up_proj[*.gate]")}
    assert names == {
        f"model.layers.{layer}.mlp.experts.gate_up_proj[{expert}.gate]"
        for layer in (0, 1)
        for expert in range(4)
    }
    assert {p.module for p in plan("llama", target="layers.[1].self_attn.[qk]_proj")} == {
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    }  # fmt: skip
    assert {p.block for p in plan("gpt2", target="c_attn")} == {"query", "key", "value"}
    assert {p.block for p in plan("gpt2", target="c_attn[*y]")} == {"query", "key"}


def test_what_a_plan_counts_by_is_a_target() -> None:
    shown = str(plan("mixtral", target=("gate", "up", "q_proj")))
    patterns = re.findall(r"[\w.*]+gate_up_proj\[[^\]]*\](?= \()", shown)
    assert patterns == [f"model.layers.*.mlp.experts.gate_up_proj[*.{role}]" for role in ("gate", "up")]
    assert {p.block.split(".")[1] for p in plan("mixtral", target=patterns)} == {"gate", "up"}
    assert len(plan("mixtral", target=patterns)) == 16


def test_the_nearest_names_are_names() -> None:
    with pytest.raises(ValueError, match="nearest names are") as error:
        plan("mixtral", target="gate_up_proj[9.gate]")
    near = str(error.value).rpartition("nearest names are ")[2].split(", ")
    assert "gate_up_proj[0.gate]" in near
    for name in near:
        assert plan("mixtral", target=name)


@pytest.mark.parametrize("family", ["mixtral", "mamba"])
def test_what_is_left_out_is_an_exclusion_and_said_when_it_is_a_target(family: str) -> None:
    left_out = plan(family).left_out
    assert left_out
    for name in left_out:
        without = plan(family, exclude=name).left_out
        assert without == {other: why for other, why in left_out.items() if other != name}
    weight = next(name for name, why in left_out.items() if "holds it" in why)
    with pytest.raises(ValueError, match=f"no linear layer holds {weight}, so it cannot be adapted"):
        plan(family, target=weight)


def test_a_role_told_by_a_label_lasts_through_saving(tmp_path: Any) -> None:
    name = "transformer.h.0.attn.c_attn[key]"
    policy = Policy(rank=1, target="query", roles={name: "query"})
    wrapped = lowrank.wrap_model(build("gpt2"), policy, progress=False)
    made = lowrank.plan_of(wrapped)
    assert {p.name for p in made} == {name, *(f"transformer.h.{i}.attn.c_attn[query]" for i in (0, 1))}
    with torch.no_grad():
        for parameter in lowrank.adapter_parameters(wrapped):
            parameter.normal_()
    lowrank.save_adapter(wrapped, tmp_path / "saved")
    again = lowrank.load_adapter(build("gpt2"), tmp_path / "saved")
    assert lowrank.plan_of(again) == made
    x = torch.arange(6)[None]
    assert torch.equal(again.eval()(x).logits, wrapped.eval()(x).logits)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.q_proj", "q_proj", True),
        ("a.q_proj", "[qk]_proj", True),
        ("a.layers.1.q", "layers.[12].q", True),
        ("a.b", "a.b.c", False),
        ("a.x[0]", "x[0]", True),
        ("a.b", "*.b", True),
        ("ab", "b", False),
    ],
)
def test_a_pattern_of_a_path(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) == expected


@pytest.mark.parametrize(
    ("label", "pattern", "expected"),
    [
        ("0.gate", "w[0.gate]", True),
        ("0.gate", "a.w[0.gate]", True),
        ("10.gate", "w[0.gate]", False),
        ("0.gate", "w[*.gate]", True),
        ("0.gate", "w[shared.gate]", True),
        ("shared.gate", "w[shared.gate]", True),
        ("shared.gate", "w[0.gate]", False),
        ("0.up", "w[shared.gate]", False),
        ("0.gate", "w", False),
        ("0.gate", "b[0.gate]", False),
        ("", "w[*]", False),
        ("0.gate", "[0.gate]", False),
    ],
)
def test_a_pattern_of_a_label(label: str, pattern: str, expected: bool) -> None:
    assert matches_label("a.w", label, pattern) == expected


def test_stars_for_numbers() -> None:
    assert starred("h.0.b2.w[12.gate]") == "h.*.b2.w[*.gate]" and starred("0.w1") == "*.w1"
