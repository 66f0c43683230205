"""Rows of embeddings that train alone: what holds for adapters holds for them, tied heads included."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import AdapterError, Policy
from lowrank.cli import saved
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb

IDS = (4, 9, 30)
# Family, the name of the embedding, its path, and the other modules that have the same weight.
CASES: dict[str, tuple[str, str, set[str]]] = {
    "llama": ("embed_tokens", "model.embed_tokens", set()),
    "tied_llama": ("embed_tokens", "model.embed_tokens", {"lm_head"}),
    "gemma3": ("embed_tokens", "model.embed_tokens", {"lm_head"}),  # it multiplies by √dim
    "gpt2": ("wte", "transformer.wte", {"lm_head"}),
    "t5": ("shared", "shared", {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
    "torch_encoder": ("embed", "embed", set()),
}


def policy(family: str, ids: Any = IDS, **options: Any) -> Policy:
    return Policy(rank=2, rows={CASES[family][0]: ids}, **options)


def batch_of(family: str) -> dict[str, Tensor]:
    """One with the tokens that train in it."""
    batch = zoo.batch(family)
    batch["input_ids"][0, : len(IDS)] = torch.tensor(IDS)
    return batch


def wrapped(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return lowrank.wrap_model(zoo.build(family, dtype), policy(family, **options), progress=False)


def offsets(model: nn.Module, path: str, name: str = "default") -> Tensor:
    tokens = lowrank.adapted_layers(model)[path].part(name).tokens
    return tokens.offsets


def moved_base(family: str, change: Mapping[int, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base with ``change`` added to rows of its embedding: what a trained model must compute."""
    model = zoo.build(family, dtype)
    weight = model.get_submodule(CASES[family][1]).weight
    with torch.no_grad():
        for i, row in change.items():
            weight[i] = (weight[i].float() + row).to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CASES)
def test_wrap_train_save_merge_and_unwrap(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = zoo.build(family, dtype), batch_of(family)
    _, path, followers = CASES[family]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base, modules = frozen_logits(model, batch), dict(model.named_modules())
    lowrank.wrap_model(model, policy(family), progress=False)
    assert torch.equal(logits(model, batch), base)
    plan = lowrank.plan_of(model)
    assert [(rows.module, rows.ids) for rows in plan.rows] == [(path, IDS)]
    assert f"rows trained: {path}: 3 rows (4, 9, 30), {3 * plan.rows[0].width:,} parameters" in str(plan)
    parameters = list(lowrank.adapter_parameters(model))
    assert sum(p.numel() for p in parameters) == plan.trainable_parameters
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    layers = lowrank.adapted_layers(model)
    held = {
        each for each, layer in layers.items() if getattr(layer, "adapters", None) and layer.part().tokens
    }
    assert held == {path} | followers
    assert offsets(model, path).dtype == torch.float32

    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert offsets(model, path).any(1).all()
    trained = logits(model, batch)
    assert not torch.equal(trained, base)
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, batch), base)

    lowrank.save_adapter(model, tmp_path / "adapter")
    fresh = lowrank.load_adapter(zoo.build(family, dtype), tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), trained)
    assert torch.equal(offsets(fresh, path), offsets(model, path))
    assert lowrank.plan_of(fresh) == plan
    swapped = lowrank.swap_adapter(wrapped(family, dtype), tmp_path / "adapter", "default")
    assert torch.equal(logits(swapped, batch), trained)

    assert all(torch.equal(tensor, before[key]) for key, tensor in lowrank.unwrap(model).state_dict().items())
    assert dict(model.named_modules()) == modules
    change = dict(zip(IDS, offsets(fresh, path).detach(), strict=True))
    rows = moved_base(family, change, dtype).get_submodule(path).weight
    lowrank.merge(fresh)
    assert torch.equal(fresh.get_submodule(path).weight, rows)
    holder = fresh.get_submodule(path).weight
    assert all(fresh.get_submodule(other).weight is holder for other in followers)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert torch.allclose(logits(fresh, batch), trained, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", CASES)
def test_output_and_gradients_are_those_of_the_moved_rows(family: str) -> None:
    batch, path = batch_of(family), CASES[family][1]
    model = wrapped(family, torch.float64)
    perturb(model)
    offsets(model, path).data.normal_(generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    weight = lowrank.adapted_layers(other)[path].base.weight
    with torch.no_grad():
        weight[list(IDS)] += offsets(other, path)
        offsets(other, path).zero_()
    weight.requires_grad_(True)
    assert torch.allclose(logits(model, batch), logits(other, batch), rtol=1e-9)
    for each in (model, other):
        each(**batch).loss.backward()
    assert torch.allclose(offsets(model, path).grad, weight.grad[list(IDS)], rtol=1e-6, atol=1e-12)
    assert torch.allclose(offsets(other, path).grad, weight.grad[list(IDS)], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["tied_llama", "gemma3"])
def test_the_weight_as_other_code_reads_it(family: str) -> None:
    model, path = wrapped(family), CASES[family][1]
    perturb(model)
    change = dict(zip(IDS, offsets(model, path).detach(), strict=True))
    wanted = moved_base(family, change).get_submodule(path).weight
    for each in (path, "lm_head"):
        layer = lowrank.adapted_layers(model)[each]
        assert torch.allclose(layer.weight, wanted, atol=1e-6)
        delta = layer.delta_weight()
        delta = delta if each == "lm_head" else delta.T
        assert torch.equal(delta[list(IDS)], offsets(model, path)) and delta.any(1).sum() == len(IDS)
    head = lowrank.adapted_layers(model)["lm_head"]
    model(**zoo.batch(family))
    head.weight[4].sum().backward()
    assert torch.equal(offsets(model, path).grad, torch.tensor([1.0, 0, 0])[:, None].expand(3, 32))


def test_several_adapters_mix_and_combine_in_the_offsets(tmp_path: Path) -> None:
    model, batch, path = wrapped("tied_llama"), batch_of("tied_llama"), CASES["tied_llama"][1]
    lowrank.add_adapter(model, policy("tied_llama", (9, 40), target="v_proj"), name="b", progress=False)
    lowrank.add_adapter(model, Policy(rank=2, target=("embed_tokens", "lm_head")), name="c", progress=False)
    perturb(model)
    one, two = offsets(model, path), offsets(model, path, "b")
    assert one.shape == (3, 32) and two.shape == (2, 32)
    shares = {"default": 0.5, "b": 2.0, "c": -1.0}
    lowrank.set_adapters(model, shares)
    mixed = logits(model, batch)
    layers = lowrank.adapted_layers(model)
    for each in (path, "lm_head"):
        sum_ = sum(share * layers[each].delta_weight(name) for name, share in shares.items())
        whole = layers[each].base.weight + (sum_ if each == "lm_head" else sum_.T)
        assert torch.allclose(layers[each].weight, whole, atol=1e-6)
    lowrank.combine_adapters(model, shares, name="all")
    assert lowrank.plan_of(model, "all").rows[0].ids == (4, 9, 30, 40)
    wanted = torch.stack([0.5 * one[0], 0.5 * one[1] + 2 * two[0], 0.5 * one[2], 2 * two[1]])
    assert torch.allclose(offsets(model, path, "all"), wanted)
    with lowrank.use_adapters(model, "all"):
        assert torch.allclose(logits(model, batch), mixed, rtol=1e-4, atol=1e-4)

    with pytest.raises(ValueError, match="model.embed_tokens: .*b.* adapts this Embedding"):
        with lowrank.adapters_for_rows(model, ["b", None, "b"]):
            pass
    lowrank.merge(model, untie=True)  # each end has an adapter of its own, so they part
    assert set(lowrank.adapter_names(model)) == {"all"}
    with lowrank.disable_adapters(model):
        assert torch.allclose(logits(model, batch), mixed, rtol=1e-4, atol=1e-4)


def test_merging_one_of_two_leaves_the_other_beside_the_moved_rows() -> None:
    model, batch = wrapped("tied_llama"), batch_of("tied_llama")
    lowrank.add_adapter(model, policy("tied_llama", (9, 40)), name="b", progress=False)
    perturb(model)
    lowrank.set_adapters(model, ("default", "b"))
    both = logits(model, batch)
    lowrank.merge(model, "default")
    assert lowrank.adapter_names(model) == ["b"]
    assert torch.allclose(logits(model, batch), both, rtol=1e-4, atol=1e-4)
    lowrank.remove_adapter(model, "b")
    assert not lowrank.adapted_layers(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_new_tokens_after_resizing_whatever_the_new_rows_start_as(tmp_path: Path) -> None:
    """Their first rows are random: an adapter brings the trained rows, not a change of other random ones."""
    new = range(zoo.VOCABULARY, zoo.VOCABULARY + 3)

    def resized(seed: int) -> nn.Module:
        model = zoo.build("tied_llama")
        torch.manual_seed(seed)
        model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
        return model

    batch = zoo.batch("tied_llama")
    batch["input_ids"][0, :3] = torch.tensor(new)
    with torch.random.fork_rng():
        model, same, other = resized(1), resized(1), resized(2)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    lowrank.wrap_model(model, policy("tied_llama", list(new)), progress=False)
    perturb(model)
    lowrank.save_adapter(model, tmp_path)
    assert torch.equal(logits(lowrank.load_adapter(same, tmp_path), batch), logits(model, batch))
    second = copy.deepcopy(other)
    assert torch.allclose(
        logits(lowrank.load_adapter(other, tmp_path), batch), logits(model, batch), rtol=1e-5, atol=1e-5
    )
    lowrank.wrap_model(second, policy("tied_llama", list(new)), progress=False)
    lowrank.swap_adapter(second, tmp_path, "default")
    assert torch.allclose(logits(second, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        AdapterError, match="model.embed_tokens: it has the rows 0 to 63, got 64, 65, 66; .*re"
    ):
        lowrank.load_adapter(zoo.build("tied_llama"), tmp_path)


def test_the_other_rows_of_the_base_must_be_the_same(tmp_path: Path) -> None:
    lowrank.save_adapter(wrapped("tied_llama"), tmp_path)
    other = zoo.build("tied_llama")
    other.lm_head.weight.data[zoo.VOCABULARY - 1] += 1
    with pytest.raises(AdapterError, match=r"embed_tokens.weight: its weights differ"):
        lowrank.load_adapter(other, tmp_path)


def test_a_policy_and_a_plan_are_the_same_after_json() -> None:
    said = policy("llama", [30, 4, 9], target="q_proj")
    again = Policy.from_json(json.loads(json.dumps(said.to_json())))
    assert again == said and again.rows == {"embed_tokens": (30, 4, 9)}
    plan = lowrank.plan_model(zoo.build("llama"), said)
    assert lowrank.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.rows[0].ids == (4, 9, 30)
    model = lowrank.wrap_model(zoo.build("llama"), plan, progress=False)
    assert lowrank.plan_of(model) == plan and offsets(model, "model.embed_tokens").shape == (3, 32)
    bare = lowrank.plan_model(zoo.build("llama"), Policy(target="q_proj"))
    assert "rows" not in bare.to_json() and bare != plan


def test_rows_do_not_count_in_the_budget() -> None:
    plan = lowrank.plan_model(zoo.build("llama"), Policy(budget=1900, rows={"embed_tokens": IDS}))
    bare = lowrank.plan_model(zoo.build("llama"), Policy(budget=1900))
    assert dict(plan) == dict(bare)
    assert plan.trainable_parameters == bare.trainable_parameters + 3 * 32 > 1900


@pytest.mark.parametrize(
    "rows", [{"e": []}, {"e": [1, 1]}, {"e": [-1]}, {"e": [True]}, {"e": "12"}, {"": [1]}, [1]]
)
def test_what_is_no_list_of_rows_is_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="^rows: expected ids by embedding, each once"):
        Policy(rows=rows)


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        (
            "llama",
            {"rows": {"embed_tokens": [3, 64]}},
            "embed_tokens: it has the rows 0 to 63, got 64; .*resize",
        ),
        ("llama", {"rows": {"embd_tokens": [3]}}, "^rows='embd_tokens' names no module; .* embed_tokens"),
        (
            "llama",
            {"rows": {"q_proj": [3]}},
            "^rows='q_proj' names .*q_proj, a Linear: expected an embedding",
        ),
        ("llama", {"rows": {"lm_head": [3]}}, "^rows='lm_head' names lm_head, a Linear: .*train="),
        ("llama", {"rows": {"embed_tokens": [0, 3]}}, "embed_tokens: 0 is its padding_idx"),
        (
            "llama",
            {"rows": {"embed_tokens": [3]}, "train": "embed_tokens"},
            "^model.embed_tokens: rows of it are to train, and train= trains all of it",
        ),
        (
            "llama",
            {"rows": {"embed_tokens": [3]}, "target": ("embed_tokens", "q_proj")},
            "^model.embed_tokens: rows of it are to train, and it is adapted too",
        ),
        ("tied_llama", {"rows": {"embed_tokens": [3]}, "train": "lm_head"}, "lm_head.*tied"),
        (
            "t5",
            {"rows": {"shared": [3], "decoder.embed_tokens": [4]}},
            "^rows: shared and decoder.embed_tokens share a weight, and have other ids",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_touched(
    family: str, options: dict[str, Any], why: str
) -> None:
    model = zoo.build(family)
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=why):
        lowrank.wrap_model(model, Policy(**options), progress=False)
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags


def test_names_of_one_shared_weight_are_one_embedding() -> None:
    plan = lowrank.plan_model(zoo.build("t5"), Policy(rows={"embed_tokens": IDS, "shared": IDS}))
    assert len(plan.rows) == 1 and plan.rows[0].parameters == 3 * plan.rows[0].width


def test_a_plan_of_another_model_is_refused() -> None:
    plan = lowrank.plan_model(zoo.build("tied_llama"), policy("tied_llama", target="q_proj"))
    model = zoo.build("tied_llama")
    model.model.embed_tokens = nn.Embedding(zoo.VOCABULARY, 16)
    with pytest.raises(ValueError, match="model.embed_tokens: expected rows of 32 numbers, got 16"):
        lowrank.wrap_model(model, plan, progress=False)


def test_an_embedding_trained_in_full_by_another_adapter_cannot_act_with_rows_of_it() -> None:
    model = wrapped("llama")
    lowrank.add_adapter(model, Policy(train=("embed_tokens",)), name="full", progress=False)
    with pytest.raises(
        ValueError, match="model.embed_tokens is trained in full by 'full', and 'default' adapts"
    ):
        lowrank.set_adapters(model, ("default", "full"))


def test_what_was_not_trained_or_holds_nan_is_not_merged() -> None:
    model = wrapped("tied_llama")
    before = model.lm_head.base.weight.clone()
    offsets(model, "model.embed_tokens").data[1, 3] = torch.nan
    with pytest.raises(ValueError, match="rows of model.embed_tokens that 'default' trains hold NaN"):
        lowrank.merge(model)
    assert torch.equal(model.lm_head.base.weight, before)


def test_it_compiles_and_is_copied() -> None:
    model, batch = wrapped("tied_llama"), batch_of("tied_llama")
    perturb(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled, batch), logits(model, batch), rtol=1e-5, atol=1e-6)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again, batch), logits(model, batch))
    layers = lowrank.adapted_layers(again)
    assert layers["lm_head"].part().tokens is layers["model.embed_tokens"].part().tokens
    assert layers["lm_head"].part().tokens is not lowrank.adapted_layers(model)["lm_head"].part().tokens


def test_a_head_with_magnitudes_merges_beside_rows_of_its_weight() -> None:
    model, batch = wrapped("tied_llama", target=("q_proj", "lm_head"), dora=True), batch_of("tied_llama")
    perturb(model)
    trained, head = logits(model, batch), lowrank.adapted_layers(model)["lm_head"]
    wanted = head.base.weight + head.delta_weight()
    lowrank.merge(model, untie=True)
    assert torch.allclose(model.lm_head.weight, wanted, atol=1e-5)
    assert torch.allclose(logits(model, batch), trained, rtol=1e-4, atol=1e-4)


def test_commands_that_read_no_model_refuse_rows_by_name(tmp_path: Path) -> None:
    lowrank.save_adapter(wrapped("llama"), tmp_path / "own")
    lowrank.export_peft(wrapped("llama"), tmp_path / "peft")
    with pytest.raises(AdapterError, match="own trains rows of embeddings: read it with load_adapter"):
        saved.read(tmp_path / "own")
    with pytest.raises(AdapterError, match="peft: trainable_token_indices needs the model: .*import_peft"):
        saved.read(tmp_path / "peft")


def test_the_memory_report_counts_them() -> None:
    model = zoo.build("tied_llama")
    plan = lowrank.plan_model(model, policy("tied_llama"))
    bare = lowrank.plan_model(model, Policy(rank=2))
    with_rows, without = (lowrank.memory_report(model, each, batch=1, tokens=4) for each in (plan, bare))
    assert with_rows.peak > without.peak
