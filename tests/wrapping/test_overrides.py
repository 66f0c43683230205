"""`layers`, `ranks` and `alphas` of a policy: which projections they mean, and what these get."""

from __future__ import annotations

from typing import Any

import pytest

import lowrank
from lowrank import Policy
from tests import zoo


def plan(family: str = "llama", **options: Any) -> lowrank.Plan:
    return lowrank.plan_model(zoo.build(family), Policy(**options))


@pytest.mark.parametrize("layers", [1, (1,), range(1, 2), "1:2", "1:"])
def test_layers_are_the_numbers_of_the_repeated_blocks(layers: Any) -> None:
    made = plan(layers=layers)
    assert {p.module.split(".")[2] for p in made} == {"1"} and len(made) == 7
    assert any("outside of layers=" in note for note in made.notes)


def test_layers_mean_every_stack() -> None:
    made = plan("t5", layers="0:1")
    assert {(p.module.split(".")[0], p.module.split(".")[2]) for p in made} == {
        ("encoder", "0"),
        ("decoder", "0"),
    }


def test_measuring_keeps_to_the_layers() -> None:
    model, policy = zoo.build("llama"), lowrank.presets.eva(rank=2, layers=1)
    measured = lowrank.measure(model, policy, [zoo.batch("llama")], progress=False)
    assert set(lowrank.plan_model(model, policy, statistics=measured)) == set(measured)


def test_the_longest_pattern_counts_and_scales_by_its_own_rank() -> None:
    made = plan(rank=4, alpha=8, ranks={"query": 6, "layers.1.self_attn.q_proj": 2}, alphas={"k_proj": 4})
    got = {p.module.removeprefix("model.layers."): made[p] for p in made}
    assert got["0.self_attn.q_proj"] == lowrank.Allocation(6, 8 / 6)
    assert got["1.self_attn.q_proj"] == lowrank.Allocation(2, 8 / 2)
    assert got["0.self_attn.k_proj"] == lowrank.Allocation(4, 4 / 4)
    assert got["0.self_attn.v_proj"] == lowrank.Allocation(4, 8 / 4)
    assert made.budget is None and made.trainable_parameters == sum(made[p].rank * sum(p.shape) for p in made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 7)}, "there is no layer 7; they are 0 to 1"),
        ({"layers": "5:9"}, "they are 0 to 1"),
        ({"layers": "a:b"}, "layers: expected numbers"),
        ({"layers": -1}, "layers: expected numbers"),
        ({"layers": ()}, "layers: expected numbers"),
        ({"ranks": {"q_prj": 2}}, "ranks='q_prj' matches no targeted projection; they are q_proj"),
        ({"alphas": {"lm_head": 2.0}}, "alphas='lm_head' matches no targeted projection"),
        ({"ranks": {"q_proj": 33}}, "ranks: expected at most 32 for .*, got 33"),
        ({"ranks": {"q_proj": 0}}, "positive numbers by name"),
        ({"ranks": {"q_proj": 2}, "budget": 5000}, "ranks= does not go with a budget"),
        ({"alphas": {"q_proj": 2}, "scaling": 1.0}, "alphas has no effect"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_they_travel_as_json() -> None:
    policy = Policy(layers=range(1, 3), ranks={"q_proj": 3}, alphas={"value": 2.5}, dora=True)
    assert Policy.from_json(policy.to_json()) == policy and policy.layers == (1, 2)
