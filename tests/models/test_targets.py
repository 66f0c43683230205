"""A target means what it says, and one that means nothing is an error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
from torch import nn

from lowrank.models.projections import Role
from lowrank.models.targets import select
from lowrank.models.trained import trained_modules
from tests import zoo


def leaves(family: str, *args: object, **kwargs: object) -> set[str]:
    return {p.name.split(".")[-1] for p in select(zoo.build(family), *args, **kwargs).projections}


def test_all_linear_leaves_heads_out() -> None:
    assert leaves("llama", "all-linear") == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert leaves("bert", "all-linear") == {"query", "key", "value", "dense"}


def test_all_linear_leaves_trained_modules_out() -> None:
    names = {
        p.module for p in select(zoo.build("bert"), "all-linear", train=("pooler", "classifier")).projections
    }
    assert not any("pooler" in name or "classifier" in name for name in names)


def test_roles_patterns_and_predicates() -> None:
    assert leaves("gpt2", "query") == {"c_attn[query]"}
    assert leaves("llama", ["q_proj", "value"]) == {"q_proj", "v_proj"}
    assert [p.module for p in select(zoo.build("llama"), "layers.1*.mlp.up_proj").projections] == [
        "model.layers.1.mlp.up_proj"
    ]
    assert leaves("llama", lambda p: p.role == Role.DOWN) == {"down_proj"}
    assert leaves("torch_encoder", "in_proj_weight") == {
        f"in_proj_weight[{r}]" for r in ("query", "key", "value")
    }
    assert leaves("gpt2", "transformer.h.0.attn.c_attn[key]") == {"c_attn[key]"}


def test_order_is_the_models() -> None:
    chosen = [p.name for p in select(zoo.build("llama"), ["v_proj", "q_proj"]).projections]
    assert chosen == sorted(chosen, key=lambda name: (name.split(".")[2], name))


def test_a_tied_or_output_weight_is_adapted_when_named() -> None:
    assert leaves("tied_llama", "lm_head") == {"lm_head"}


def test_exclude_takes_projections_and_modules_around_them() -> None:
    assert "up_proj" not in leaves("llama", "all-linear", exclude=("up_proj",))
    assert leaves("llama", "all-linear", exclude=("mlp",)) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_excluding_a_role_leaves_modules_of_that_name_in() -> None:
    """In BERT the down-projection is ``output.dense``."""
    kept = {p.role for p in select(zoo.build("bert"), "all-linear", exclude="output").projections}
    assert Role.DOWN in kept and Role.OUTPUT not in kept


def test_a_name_that_is_a_role_of_nothing_is_a_name() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), output=nn.Linear(4, 4), last=nn.Linear(4, 2)))
    assert [p.module for p in select(model, "output").projections] == ["output"]
    assert [p.module for p in select(model, "all-linear", exclude="output").projections] == ["first", "last"]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("q_porj", {}, "target='q_porj' matches no projection; the nearest names are q_proj"),
        (["q_proj", "nothing"], {}, "target='nothing' matches no projection"),
        ((), {}, "no target: name projections"),
        ("", {}, "target: expected names"),
        (lambda p: False, {}, "accepts none of the model's 15 projections"),
        ("q_proj", {"exclude": ("q_proj",)}, r"leaves nothing of target='q_proj'"),
        (
            "q_proj",
            {"exclude": ("v_porj",)},
            "exclude='v_porj' matches no projection; the nearest names are v_proj",
        ),
        ("qurey", {}, "target='qurey' matches no projection; the nearest names are query"),
        ("q_proj", {"train": ("hed",)}, "train='hed' names no module; the nearest name is lm_head"),
        (None, {}, "target: expected names, got None"),
        ("q_proj", {"exclude": None}, "exclude: expected names, got None"),
        ("q_proj", {"train": 5}, "train: expected names, got 5"),
        ("q_proj", {"fused": {"qkv": {"query": 1}}}, "fused='qkv' names no module; the nearest names are"),
        ("q_proj", {"train": ("layers",)}, r"a ModuleList, which is never called: .* such as 'layers\.\*'"),
    ],
)
def test_a_name_that_means_nothing_is_an_error(target: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(zoo.build("llama"), target, **options)


def test_a_model_without_projections() -> None:
    import torch

    with pytest.raises(ValueError, match="ReLU has no linear layer, embedding or convolution"):
        select(torch.nn.ReLU(), "all-linear")


WITHOUT_LINEAR: dict[str, tuple[Callable[[], nn.Module], str, list[str]]] = {
    "by role": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "conv", ["0", "2"]),
    "by name": (lambda: nn.ModuleDict({"words": nn.Embedding(9, 4)}), "words", ["words"]),
    "an embedding": (lambda: nn.ModuleDict({"words": nn.Embedding(9, 4)}), "embedding", ["words"]),
}


@pytest.mark.parametrize("case", WITHOUT_LINEAR)
def test_a_model_without_a_linear_layer(case: str) -> None:
    build, target, wanted = WITHOUT_LINEAR[case]
    assert [p.module for p in select(build(), target).projections] == wanted
    with pytest.raises(ValueError, match="the model has nothing of target='all-linear'"):
        select(build(), "all-linear")


def test_a_target_that_is_trained_in_full_is_said() -> None:
    with pytest.raises(ValueError, match="'classifier' names classifier, which train= trains in full"):
        select(zoo.build("bert"), "classifier", train=("classifier",))


def undivided() -> nn.Module:
    """Two blocks whose fused weights nothing divides: their attention is never called."""

    def block() -> nn.Module:
        attention = nn.ModuleDict({"query_key_value": nn.Linear(32, 96), "dense": nn.Linear(32, 32)})
        mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(32, 48), "dense_4h_to_h": nn.Linear(48, 32)})
        return nn.ModuleDict({"attention": attention, "mlp": mlp})

    return nn.ModuleList([block(), block()])


def leaves_of_undivided(*args: object, **kwargs: object) -> set[str]:
    return {p.name.split(".")[-1] for p in select(undivided(), *args, **kwargs).projections}


def test_an_undivided_weight_is_adapted_whole_by_all_linear_and_by_name() -> None:
    for target in ("all-linear", "query_key_value"):
        selection = select(undivided(), target)
        whole = [p for p in selection.projections if p.module.endswith("query_key_value")]
        assert [(p.role, p.shape) for p in whole] == [(Role.OTHER, (96, 32))] * 2
        assert any("query_key_value (2): adapted as a whole" in note for note in selection.notes)
    assert "query_key_value" not in leaves_of_undivided("all-linear", exclude=("query_key_value",))


@pytest.mark.parametrize("target", ["query", ("value", "dense_h_to_4h"), ("output", "key")])
def test_a_role_that_may_lie_in_an_undivided_weight_is_an_error(target: object) -> None:
    with pytest.raises(ValueError, match="it is not known where.*1 more.*exclude=.'query_key_value',."):
        select(undivided(), target)
    with pytest.raises(ValueError, match="matches no projection"):
        select(undivided(), "query", exclude=("query_key_value",))
    assert leaves_of_undivided("output") == {"dense"}
    assert leaves_of_undivided(("output", "query_key_value")) == {"dense", "query_key_value"}


def test_excluding_a_role_that_lies_in_a_whole_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="exclude='query' may mean rows of .*query_key_value"):
        select(undivided(), "all-linear", exclude="query")


def test_roles_of_interleaved_heads() -> None:
    for family in ("neox", "bloom", "falcon40b"):
        assert leaves(family, ("query", "value")) == {"query_key_value[query]", "query_key_value[value]"}
        blocks = {f"query_key_value[{role}]" for role in ("query", "key", "value")}
        assert leaves(family, "query_key_value") == blocks
        assert leaves(family, "query_key_value", exclude="key") == blocks - {"query_key_value[key]"}
        assert select(zoo.build(family), "query").notes == []


def test_fused_may_be_told_where_the_layout_is_known() -> None:
    assert leaves("phi3", "query") == {"qkv_proj[query]"}
    assert leaves("phi3", "query", fused={"qkv_proj": {"query": 32, "key": 16, "value": 16}}) == {
        "qkv_proj[query]"
    }


def test_trained_modules_are_the_outermost() -> None:
    assert trained_modules(zoo.build("bert"), ("pooler", "pooler.dense")) == ["bert.pooler"]
