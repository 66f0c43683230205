"""One adapter for all experts of a tensor: planned, added in every product, kept, merged and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import Plan, Policy, allocate, presets
from tests.helpers import frozen_logits, logits, perturb
from tests.layers.test_experts import CASES, adapted, batch, build, layers, moved_without_full_updates
from tests.peft_format.common import warnings_of_peft


def shared(name: str = "qwen3_moe", way: str = "grouped_mm", **options: Any) -> nn.Module:
    return adapted(name, way, experts="shared", **options)


def test_the_plan_has_one_projection_for_each_kind_of_rows() -> None:
    model = build("qwen3_moe")
    policy = presets.lora(rank=3, target="experts.*", experts="shared")
    plan = lowrank.plan_model(model, policy)
    path = "model.layers.0.mlp.experts"
    assert {p.name: p.shared for p in plan} == {
        f"{path}.gate_up_proj[shared.gate]": 4,
        f"{path}.gate_up_proj[shared.up]": 4,
        f"{path}.down_proj[shared.down]": 4,
    }
    assert plan.trainable_parameters == 3 * (3 * (32 + 16))
    assert "3 projections: one adapter for all 4 experts" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan and Policy.from_json(policy.to_json()) == policy
    lowrank.wrap_model(model, plan, progress=False)
    parameters = list(lowrank.adapter_parameters(model))
    assert sum(parameter.numel() for parameter in parameters) == plan.trainable_parameters
    assert sorted(tuple(each.shape) for each in parameters) == sorted(
        [(1, 3, 32), (1, 16, 3), (1, 3, 32), (1, 16, 3), (1, 3, 16), (1, 32, 3)]
    )


def test_a_budget_pays_for_one_adapter_and_not_for_one_of_each_expert() -> None:
    each, one = (
        lowrank.plan_model(build("qwen3_moe"), Policy(target="experts.*", budget=1000, experts=experts))
        for experts in ("each", "shared")
    )
    assert {a.rank for a in each.values()} == {1} and {a.rank for a in one.values()} == {6}


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_product_adds_the_same_update_for_all_experts(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, moved = moved_without_full_updates(monkeypatch, name, way, experts="shared")
    (layer,) = layers(model)
    for param in layer.lora.params():
        delta = layer.delta_weight(param)
        each = delta.view(4, -1, delta.shape[1])
        assert each.any() and all(torch.equal(own, each[0]) for own in each)
    torch.testing.assert_close(logits(lowrank.merge(model), batch()), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_saved_loaded_swapped_and_taken_out(name: str, tmp_path: Path) -> None:
    model = perturb(shared(name))
    moved = logits(model, batch())
    lowrank.save_adapter(model, tmp_path)
    loaded = lowrank.load_adapter(build(name), tmp_path)
    assert torch.equal(logits(loaded, batch()), moved)
    assert lowrank.plan_of(loaded) == lowrank.plan_of(model)
    swapped = lowrank.swap_adapter(shared(name), tmp_path, "default")
    assert torch.equal(logits(swapped, batch()), moved)
    other = build(name)
    with torch.no_grad():
        other.model.layers[0].get_submodule("feed_forward" if name == "llama4" else "mlp").experts.down_proj[
            3
        ].add_(1)
    with pytest.raises(lowrank.AdapterError, match="other weights"):
        lowrank.load_adapter(other, tmp_path)
    base = build(name).state_dict()
    state = lowrank.unwrap(model).state_dict()
    assert state.keys() == base.keys() and all(torch.equal(state[key], base[key]) for key in base)


def test_it_acts_beside_one_of_each_expert_and_is_combined_with_it() -> None:
    model = perturb(shared())
    lowrank.add_adapter(model, presets.lora(rank=2, target="experts.*"), name="each", progress=False)
    lowrank.add_adapter(
        model, presets.lora(rank=1, target="experts.*", experts="shared"), name="more", progress=False
    )
    perturb(model)
    for weights in ({"default": 0.5, "each": 2.0}, {"default": 0.5, "more": 2.0}):
        lowrank.set_adapters(model, weights)
        moved = logits(model, batch())
        lowrank.combine_adapters(model, weights, name="both")
        assert {p.shared for p in lowrank.plan_of(model, "both")} == ({1} if "each" in weights else {4})
        lowrank.set_adapters(model, "both")
        torch.testing.assert_close(logits(model, batch()), moved, rtol=1e-4, atol=1e-4)
        lowrank.remove_adapter(model, "both")


@warnings_of_peft
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_peft_gets_an_equal_slice_for_each_expert(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = perturb(shared(name))
    export = lowrank.export_peft(model, tmp_path)
    assert export.error < 1e-5
    theirs = peft.PeftModel.from_pretrained(build(name, "eager"), tmp_path).merge_and_unload().state_dict()
    ours = lowrank.merge(model).state_dict()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    imported = lowrank.import_peft(build(name), tmp_path)
    assert {p.shared for p in lowrank.plan_of(imported)} == {1}
    torch.testing.assert_close(logits(imported, batch()), logits(model, batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", [presets.eva, presets.lora_ga, presets.lora_fa])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_starts_that_read_no_weight(name: str, preset: Any) -> None:
    model, base = build(name), frozen_logits(build(name), batch())
    batches = [{**batch(), "labels": batch()["input_ids"]}]
    policy = preset(rank=2, target="experts.*", experts="shared")
    lowrank.wrap_model(model, policy, batches=batches, progress=False)
    assert torch.equal(logits(model, batch()), base)
    assert {p.shared for p in lowrank.plan_of(model)} == {4}


@pytest.mark.parametrize("preset", [presets.pissa, presets.milora, presets.olora, presets.corda])
def test_starts_from_a_weight_are_refused(preset: Any) -> None:
    model = build("qwen3_moe")
    policy = preset(rank=2, target="experts.*", experts="shared")
    with pytest.raises(ValueError, match=r"shared\.gate\].* has no one weight: 4 experts share an adapter"):
        lowrank.wrap_model(model, policy, batches=[batch()], progress=False)
    assert not lowrank.adapter_names(model)


def test_what_cannot_be_shared_is_refused() -> None:
    policy = Policy(target="experts.*", experts="shared")
    with pytest.raises(ValueError, match="sensitivity is of one weight, and 4 experts share this adapter"):
        lowrank.plan_model(
            build("qwen3_moe"),
            Policy(target="experts.*", experts="shared", allocate=allocate.Sensitivity()),
            batches=[{**batch(), "labels": batch()["input_ids"]}],
        )
    listed = nn.Module()
    listed.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    with pytest.raises(ValueError, match=r"experts\.0 is a module of its own"):
        lowrank.plan_model(listed, policy)
    some = Policy(target=lambda p: p.block.startswith(("0.", "1.")), experts="shared")
    with pytest.raises(ValueError, match="acts on all 4 of the tensor, and the target names 2"):
        lowrank.plan_model(build("qwen3_moe"), some)
    with pytest.raises(ValueError, match='experts: expected "each" or "shared", got \'one\''):
        Policy(experts="one")
    plan = lowrank.plan_model(build("qwen3_moe"), Policy(target="q_proj", experts="shared"))
    assert "no targeted weight is a tensor of experts" in str(plan)


def test_a_plan_for_another_number_of_experts_or_for_both_kinds_is_refused() -> None:
    model = build("qwen3_moe")
    one = lowrank.plan_model(model, Policy(target="experts.*", experts="shared"))
    each = lowrank.plan_model(model, Policy(target="experts.*"))
    with pytest.raises(ValueError, match="another adapter of this plan is shared by all experts"):
        lowrank.wrap_model(model, Plan({**one, **each}), progress=False)
    data = one.to_json()
    for row in data["projections"]:
        row["shared"] = 3
    with pytest.raises(ValueError, match="shared by 3 experts, and the weight has 4"):
        lowrank.wrap_model(model, Plan.from_json(data), progress=False)
