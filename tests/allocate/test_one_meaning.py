"""Rank, alpha, scaling and budget mean the same, whatever allocator divides the budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest

import lowrank
from lowrank import Allocation, Plan, Policy, Role, presets
from lowrank.allocate import EnergyRank, ExplainedVariance, Sensitivity, StableRank, Uniform
from lowrank.init import ByRole, Kaiming, Minor, Principal, TaskAligned
from tests import zoo

ALLOCATORS = [Uniform(), Sensitivity(), Sensitivity(floor=1), ExplainedVariance(), StableRank(), EnergyRank()]


def batches() -> list[dict[str, Any]]:
    """More tokens than a projection has inputs, so that every direction varies."""
    return [zoo.batch("llama", seed=seed) for seed in range(8)]


def plan(policy: Policy) -> Plan:
    return lowrank.plan_model(zoo.build("llama"), policy, batches=batches(), progress=False)


@pytest.mark.parametrize("allocate", ALLOCATORS, ids=repr)
@pytest.mark.parametrize(("budget", "rank"), [(1500, 1), (6000, 6), (12000, 12)])
def test_a_budget_gives_one_reference_rank_and_one_scaling(allocate: Any, budget: int, rank: int) -> None:
    """The uniform allocation costs 928 parameters a rank in the two layers of this model."""
    made = plan(Policy(allocate=allocate, budget=budget))
    assert (made.budget, made.reference_rank) == (budget, rank)
    if isinstance(allocate, Sensitivity):
        assert min(a.scaling for a in made.values()) == 16.0 / rank
    else:
        assert {a.scaling for a in made.values()} == {16.0 / rank}
    assert made.trainable_parameters <= budget


@pytest.mark.parametrize("allocate", ALLOCATORS, ids=repr)
def test_a_rank_is_the_budget_that_it_costs(allocate: Any) -> None:
    by_rank, by_budget = (
        plan(Policy(allocate=allocate, rank=6)),
        plan(Policy(allocate=allocate, budget=6 * 928)),
    )
    assert by_rank == by_budget
    assert (by_rank.budget, by_rank.reference_rank) == (6 * 928, 6)


@pytest.mark.parametrize("budget", [6000, 12000, 20000])
def test_explained_variance_spends_its_budget(budget: int) -> None:
    made = plan(presets.eva(budget=budget))
    left = budget - made.trainable_parameters
    growing = [
        made.costs[p] for p, a in made.items() if a.rank < min(2 * (made.reference_rank or 0), *p.shape)
    ]
    assert left < min(growing)
    assert max(a.rank for a in made.values()) <= 2 * (made.reference_rank or 0)


# -- the scaling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", ALLOCATORS, ids=repr)
@pytest.mark.parametrize(
    ("scaling", "expected"),
    [("alpha/r", 16.0 / 6), ("alpha/sqrt(r)", 16.0 / math.sqrt(6)), (0.3, 0.3), (2, 2.0)],
)
def test_the_scaling_refers_to_the_reference_rank(allocate: Any, scaling: Any, expected: float) -> None:
    made = plan(Policy(allocate=allocate, budget=6000, scaling=scaling))
    scalings = [a.scaling for a in made.values()]
    if isinstance(allocate, Sensitivity):
        policy = Policy(allocate=allocate)
        measured = lowrank.measure(zoo.build("llama"), policy, batches(), progress=False)
        sensitivities = [measured[p].sensitivity or 0.0 for p in made]
        factors = [max(1.0, len(made) * s / sum(sensitivities)) for s in sensitivities]
        assert max(factors) > 1
        assert scalings == pytest.approx([expected * factor for factor in factors])
    else:
        assert scalings == pytest.approx([expected] * len(made))


@pytest.mark.parametrize("scaling", ["alpha", "alpha / r", "", 0, 0.0, -1.0, math.inf, math.nan, True, None])
def test_bad_scalings(scaling: Any) -> None:
    with pytest.raises(ValueError, match='scaling: expected "alpha/r", "alpha/sqrt.r." or a positive number'):
        Policy(scaling=scaling)


def test_a_layer_has_the_scaling_of_the_plan() -> None:
    model = lowrank.wrap_model(
        zoo.build("llama"), presets.lora(rank=4, scaling="alpha/sqrt(r)"), progress=False
    )
    assert {
        adapter.scaling for layer in lowrank.adapted_layers(model).values() for adapter in layer.part()
    } == {8.0}


# -- allocators of others -------------------------------------------------------------------------------


class Recording:
    """Keeps what it was called with, and gives each projection ``ranks(p)``."""

    needs = frozenset[str]()

    def __init__(self, rank: int = 1) -> None:
        self.rank, self.seen = rank, {}

    def __call__(self, projections: Any, **given: Any) -> Mapping[Any, Allocation]:
        self.seen = given
        return {p: Allocation(self.rank, given["alpha"] / given["rank"]) for p in projections}


@pytest.mark.parametrize(
    ("policy", "rank", "budget", "scaling"),
    [
        ({"rank": 5}, 5, 5 * 928, 16.0 / 5),
        ({"budget": 12000}, 12, 12000, 16.0 / 12),
        ({"budget": 12000, "scaling": "alpha/sqrt(r)"}, 12, 12000, 16.0 / math.sqrt(12)),
        ({"budget": 12000, "scaling": 0.7}, 12, 12000, 0.7),
        ({"rank": 20}, 20, 4 * 16 * 48 + 20 * (928 - 4 * 48), 16.0 / 20),  # k and v of 16 rows
    ],
)
def test_any_allocator_gets_resolved_values(policy: dict, rank: int, budget: int, scaling: float) -> None:
    mine = Recording()
    made = lowrank.plan_model(zoo.build("llama"), Policy(allocate=mine, **policy))
    assert (mine.seen["rank"], mine.seen["budget"]) == (rank, budget)
    assert mine.seen["alpha"] / mine.seen["rank"] == pytest.approx(scaling)
    assert made.reference_rank == rank
    assert {a.scaling for a in made.values()} == {mine.seen["alpha"] / rank}


def test_more_than_the_budget_is_refused_and_more_than_a_rank_is_not() -> None:
    model = zoo.build("llama")
    with pytest.raises(
        ValueError, match="Recording.*its ranks cost 2,784 parameters, more than the budget of 2,000"
    ):
        lowrank.plan_model(model, Policy(allocate=Recording(3), budget=2000))
    made = lowrank.plan_model(model, Policy(allocate=Recording(3), rank=2))
    assert (made.trainable_parameters, made.budget, made.reference_rank) == (2784, None, 2)


def test_an_allocator_that_forgets_a_projection_is_named() -> None:
    class Forgetful(Recording):
        def __call__(self, projections: Any, **given: Any) -> Mapping[Any, Allocation]:
            return super().__call__(projections[:-2], **given)

    with pytest.raises(ValueError, match="Forgetful.*gives nothing for model.layers.1.mlp.up_proj .2 in all"):
        lowrank.plan_model(zoo.build("llama"), Policy(allocate=Forgetful()))


@pytest.mark.parametrize("error", [KeyError("moment"), TypeError("no"), RuntimeError("no"), ValueError("no")])
def test_an_error_of_an_allocator_names_it(error: Exception) -> None:
    class Failing(Recording):
        def __call__(self, projections: Any, **given: Any) -> Mapping[Any, Allocation]:
            raise error

    with pytest.raises(ValueError, match="Failing") as caught:
        lowrank.plan_model(zoo.build("llama"), Policy(allocate=Failing()))
    assert caught.value.__cause__ is error


# -- budgets that are too small, and what is left ---------------------------------------------------------


@pytest.mark.parametrize("allocate", ALLOCATORS, ids=repr)
@pytest.mark.parametrize("budget", [47, 1e-9])
def test_a_budget_below_one_rank_is_one_error_before_calibration(allocate: Any, budget: float) -> None:
    with pytest.raises(
        ValueError,
        match=r"a budget of (47|0) parameters is too small for one rank anywhere: the cheapest costs 48",
    ):
        lowrank.plan_model(zoo.build("llama"), Policy(allocate=allocate, budget=budget))


def test_uniform_needs_one_rank_each_and_the_others_do_not() -> None:
    with pytest.raises(
        ValueError, match=r"Uniform.*a budget of 500 parameters is too small for rank 1 in each of 14"
    ):
        plan(Policy(budget=500))
    made = plan(Policy(allocate=Sensitivity(), budget=500))
    assert made.reference_rank == 1 and 0 < made.trainable_parameters <= 500
    assert min(a.scaling for a in made.values()) == 16.0


@pytest.mark.parametrize(
    ("policy", "left", "why"),
    [
        (Policy(budget=1872), 16, "one more rank costs 48 or more"),
        (Policy(budget=2700), 2700 - 1856, "Uniform() raises no rank further"),
        (Policy(budget=100_000), 100_000 - 26_624, "every projection has the largest rank that it can have"),
        (Policy(allocate=Recording(1), budget=2000), 1072, "Recording"),
        (Policy(allocate=Recording(1), rank=2), 928, "Recording"),
    ],
    ids=["remainder", "uniform", "caps", "rule", "rule of a rank"],
)
def test_what_is_left_is_said(policy: Policy, left: int, why: str) -> None:
    made = lowrank.plan_model(zoo.build("llama"), policy)
    assert made.budget is not None and made.budget - made.trainable_parameters == left
    (note,) = [note for note in made.notes if "are left" in note]
    assert note.startswith(f"{left:,} parameters of the budget of {made.budget:,} are left: ") and why in note
    assert f"note: {note}" in str(made)
    spent = f"{made.trainable_parameters:,} trainable adapter parameters of a budget of {made.budget:,}"
    assert f"{spent} ({left:,} left), reference rank {made.reference_rank}" in str(made).splitlines()


def test_nothing_is_said_where_nothing_is_left() -> None:
    made = lowrank.plan_model(zoo.build("llama"), presets.lora(rank=3))
    assert not any("are left" in note for note in made.notes)
    assert [line for line in str(made).splitlines() if not line.startswith("note: ")][-1] == (
        "2,784 trainable adapter parameters of a budget of 2,784, reference rank 3"
    )


@pytest.mark.parametrize("allocate", [Sensitivity(unit="ranks"), ExplainedVariance(unit="ranks")], ids=repr)
def test_the_authors_rules_take_a_rank_and_no_budget(allocate: Any) -> None:
    with pytest.raises(ValueError, match=r"unit='ranks'.*leave budget=None"):
        Policy(allocate=allocate, budget=10_000)
    made = plan(Policy(allocate=allocate, rank=3))
    assert sum(a.rank for a in made.values()) == 3 * len(made) and made.reference_rank == 3


# -- as data ----------------------------------------------------------------------------------------------

POLICIES = {
    "default": Policy(),
    "tlora": presets.tlora(budget=0.01, init=TaskAligned(), allocate=Sensitivity(floor=2)),
    "ailora": presets.ailora(scaling="alpha/sqrt(r)", dropout=0.1, exclude=["lm_head"]),
    "nested": Policy(
        target=["q_proj", Role.VALUE],
        init=ByRole({Role.QUERY: Principal(), Role.VALUE: Minor()}, otherwise=Kaiming()),
        train=("classifier",),
        fused={"qkv_proj": {"query": 64, Role.KEY: 16, "value": 16}},
        scaling=0.5,
        seed=3,
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_survive_json(name: str) -> None:
    policy = POLICIES[name]
    data = json.loads(json.dumps(policy.to_json()))
    assert Policy.from_json(data) == policy
    assert list(data) == ["format", "version", *(each.name for each in fields(Policy))]


def test_the_fields_of_a_policy_are_in_their_documented_order() -> None:
    first = "target exclude rank budget alpha scaling init allocate dropout train fused seed".split()
    assert [each.name for each in fields(Policy)][: len(first)] == first


def test_a_field_that_is_not_said_has_its_default() -> None:
    data = Policy(rank=3).to_json()
    del data["scaling"]
    assert Policy.from_json(data) == Policy(rank=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected lowrank-policy 1, got lowrank-policy 2"),
        ({"format": "lowrank-plan"}, "got lowrank-plan"),
        ({"rnk": 3}, "a policy has no field rnk; it has allocate, alpha"),
        ({"rank": 0}, "rank: expected a whole number"),
        ({"scaling": "r"}, "scaling: expected"),
        ({"init": {"class": "Uniform", "fields": {}}}, "init: expected one of lowrank.init, got"),
        (
            {"allocate": {"class": "Kaiming", "fields": {}}},
            "allocate: expected one of lowrank.allocate, got",
        ),
        (
            {"allocate": {"class": "System", "fields": {}}},
            r"expected one of lowrank.allocate, got System\(\)",
        ),
        ({"allocate": {"class": "Sensitivity", "fields": {"x": 1}}}, r"got Sensitivity\(x=1\)"),
    ],
)
def test_what_is_no_policy(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.from_json({**Policy().to_json(), **change})


@pytest.mark.parametrize(
    ("policy", "field"),
    [(Policy(target=lambda p: True), "target"), (Policy(allocate=Recording()), "allocate")],
)
def test_what_json_cannot_hold_is_named(policy: Policy, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}=.*cannot be written as JSON"):
        policy.to_json()


def test_plans_keep_the_reference_rank_and_older_ones_have_none() -> None:
    made = lowrank.plan_model(zoo.build("llama"), Policy(budget=2000))
    data = json.loads(json.dumps(made.to_json()))
    assert data["reference_rank"] == 2 and Plan.from_json(data) == made
    del data["reference_rank"]
    old = Plan.from_json(data)
    assert old.reference_rank is None and dict(old) == dict(made)
    assert "reference rank" not in str(old)
    with pytest.raises(ValueError, match="reference_rank: expected at least 1"):
        Plan.from_json({**data, "reference_rank": 0})


def test_a_wrapped_model_keeps_the_reference_rank() -> None:
    made = lowrank.plan_model(zoo.build("llama"), Policy(budget=2000))
    model = lowrank.wrap_model(zoo.build("llama"), made, progress=False)
    assert lowrank.plan_of(model).reference_rank == 2
