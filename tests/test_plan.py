"""A plan is data: printed, saved, and carried to PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowrank
from lowrank import Allocation, Plan, presets
from lowrank.formats.patterns import peft_patterns
from lowrank.models.projections import Projection, Role
from tests import zoo


def projection(
    module: str, out: int = 8, into: int = 6, role: Role = Role.QUERY, **more: object
) -> Projection:
    return Projection(module, "weight", (0, out), role, into, out, **more)


A, B, C = projection("a"), projection("b", 4, 4, Role.UP), projection("c", 8, 6, Role.OTHER)
PLAN = Plan(
    {A: Allocation(2, 1.5), B: Allocation(3, 0.5), C: Allocation(0, 1.0)}, budget=60, energies={A: 0.25}
)


def test_a_plan_is_a_mapping() -> None:
    assert PLAN[A] == Allocation(2, 1.5) and list(PLAN) == [A, B, C] and len(PLAN) == 3
    assert PLAN.adapted == [A, B]
    assert PLAN.trainable_parameters == 2 * 14 + 3 * 8
    assert repr(PLAN) == "<Plan: 2 of 3 projections, 52 parameters>"


def test_the_table() -> None:
    header, rule, a, b, c, total = str(PLAN).splitlines()
    assert header.split() == "projection role out × in rank scaling parameters share energy".split()
    assert set(rule) == {"-", " "}
    assert a.split() == ["a", "query", "8", "×", "6", "2", "1.5", "28", "46.7%", "0.2500"]
    assert b.split() == ["b", "up", "4", "×", "4", "3", "0.5", "24", "40.0%", "–"]
    assert "left alone" in c
    assert total == "52 trainable adapter parameters of a budget of 60 (8 left)"


def test_frozen_factors_do_not_count() -> None:
    plan = Plan({A: Allocation(2, 1.0)}, costs={A: 8})
    assert plan.trainable_parameters == 16


@pytest.mark.parametrize(
    "policy", [presets.lora(), presets.pissa(), presets.ailora(), presets.olora(), presets.milora()]
)
def test_plans_survive_json(policy: lowrank.Policy, tmp_path: Path) -> None:
    plan = lowrank.plan_model(zoo.build("gpt2"), policy)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert str(Plan.load(tmp_path / "plan.json")) == str(plan)
    assert [p.name for p in Plan.load(tmp_path / "plan.json")] == [p.name for p in plan]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.pop("projections"), "KeyError"),
        (lambda d: d["projections"][0].update(rank=-1), "expected a rank from 0 to 6, got -1"),
        (lambda d: d["projections"][0].update(rank=7), "expected a rank from 0 to 6, got 7"),
        (lambda d: d["projections"][0].update(rank=True), "TypeError"),
        (lambda d: d["projections"][0].update(scaling=float("inf")), "expected a finite scaling, got inf"),
        (lambda d: d.update(dropout=1.0), "dropout: expected a number from 0"),
        (lambda d: d["projections"][0].update(role="cook"), "cook"),
        (lambda d: d["projections"].append(d["projections"][0]), "a is listed twice"),
        (lambda d: d.update(projections=[]), "no projection any rank"),
        (lambda d: d.update(init=3), "3 is not an initializer"),
        (lambda d: d["projections"][0].update(rows=[0]), r"rows are \(start, stop\) or .*got \[0\]"),
        (lambda d: d["projections"][0].update(rows=[0, 8, 2]), r"got \[0, 8, 2\]"),
        (lambda d: d["projections"][0].update(rows=[0, 8.0]), "TypeError"),
    ],
)
def test_what_is_no_plan(change, message: str, tmp_path: Path) -> None:
    data = PLAN.to_json()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_rows_are_saved_as_two_or_four_numbers(tmp_path: Path) -> None:
    rows = {"plain": (0, 8), "interleaved": (2, 28, 2, 8)}
    plan = Plan(
        {Projection(name, "weight", own, Role.KEY, 6, 8): Allocation(2, 1.0) for name, own in rows.items()}
    )
    plan.save(tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["version"] == 1 and [row["rows"] for row in saved["projections"]] == [[0, 8], [2, 28, 2, 8]]
    assert {p.module: p.rows for p in Plan.load(tmp_path / "plan.json")} == rows


def test_text_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("rank: 8")
    with pytest.raises(ValueError, match="is not JSON"):
        Plan.load(tmp_path / "plan.json")


# -- PEFT ----------------------------------------------------------------------------------------------


def peft_values(paths: list[str], said: dict) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each path, found as PEFT finds them: the first key that matches wins."""

    def look(patterns: dict, path: str, otherwise: float) -> float:
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        return otherwise

    return {
        path: (
            look(said["rank_pattern"], path, said["r"]),
            look(said["alpha_pattern"], path, said["lora_alpha"]),
        )
        for path in paths
    }


PATHS = st.lists(
    st.lists(
        st.sampled_from(["a", "b", "layers", "0", "1", "10", "q_proj", "x.y"]), min_size=1, max_size=5
    ).map(".".join),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(PATHS, st.data())
def test_every_module_gets_its_own_rank_in_peft(paths: list[str], data: st.DataObject) -> None:
    ranks = {path: data.draw(st.integers(1, 4)) for path in paths}
    alphas = {path: data.draw(st.sampled_from([1.0, 2.5, 16.0])) for path in paths}
    said = peft_patterns(ranks, alphas)
    assert said["rank_pattern"].keys() == said["alpha_pattern"].keys()
    assert peft_values(paths, said) == {path: (ranks[path], alphas[path]) for path in paths}


def test_the_blocks_of_a_fused_weight_add_up() -> None:
    blocks = [Projection("qkv", "weight", (i, i + 8), Role.OTHER, 8, 8, str(i)) for i in (0, 8)]
    plan = Plan({blocks[0]: Allocation(1, 2.0), blocks[1]: Allocation(3, 1.0), C: Allocation(0, 1.0)})
    assert plan.to_peft() == {
        "target_modules": ["qkv"], "r": 4, "lora_alpha": 5.0, "rank_pattern": {}, "alpha_pattern": {}
    }  # fmt: skip


def test_a_tensor_without_a_linear_has_no_peft_name() -> None:
    plan = lowrank.plan_model(zoo.build("torch_encoder"), presets.lora(rank=2))
    with pytest.raises(ValueError, match="in_proj_weight.*no Linear holds"):
        plan.to_peft()
