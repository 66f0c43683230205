"""What is found in each family, and what each projection is taken for."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lowrank.models.families import role_of
from lowrank.models.heads import output_heads
from lowrank.models.projections import Projection, Role, find_projections, scan
from tests import zoo
from tests.helpers import numbers

Q, K, V, OUT = Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT
GATE, UP, DOWN, OTHER = Role.GATE, Role.UP, Role.DOWN, Role.OTHER

LLAMA = {
    "model.layers.N.self_attn.q_proj": Q,
    "model.layers.N.self_attn.k_proj": K,
    "model.layers.N.self_attn.v_proj": V,
    "model.layers.N.self_attn.o_proj": OUT,
    "model.layers.N.mlp.gate_proj": GATE,
    "model.layers.N.mlp.up_proj": UP,
    "model.layers.N.mlp.down_proj": DOWN,
    "lm_head": OTHER,
}


FALCON = {
    "transformer.h.N.self_attention.query_key_value[query]": Q,
    "transformer.h.N.self_attention.query_key_value[key]": K,
    "transformer.h.N.self_attention.query_key_value[value]": V,
    "transformer.h.N.self_attention.dense": OUT,
    "transformer.h.N.mlp.dense_h_to_4h": UP,
    "transformer.h.N.mlp.dense_4h_to_h": DOWN,
    "lm_head": OTHER,
}


def bert_like(name: str, **rest: Role) -> dict[str, Role]:
    return {
        f"{name}.encoder.layer.N.attention.self.query": Q,
        f"{name}.encoder.layer.N.attention.self.key": K,
        f"{name}.encoder.layer.N.attention.self.value": V,
        f"{name}.encoder.layer.N.attention.output.dense": OUT,
        f"{name}.encoder.layer.N.intermediate.dense": UP,
        f"{name}.encoder.layer.N.output.dense": DOWN,
        **{key.replace("__", "."): role for key, role in rest.items()},
    }


def clip_tower(name: str) -> dict[str, Role]:
    layer = f"{name}_model.encoder.layers.N"
    return {
        f"{layer}.self_attn.q_proj": Q,
        f"{layer}.self_attn.k_proj": K,
        f"{layer}.self_attn.v_proj": V,
        f"{layer}.self_attn.out_proj": OUT,
        f"{layer}.mlp.fc1": UP,
        f"{layer}.mlp.fc2": DOWN,
    }


def t5_attention(name: str) -> dict[str, Role]:
    return {f"{name}.{leaf}": role for leaf, role in {"q": Q, "k": K, "v": V, "o": OUT}.items()}


def t5_stack(name: str, feed_forward: int) -> dict[str, Role]:
    layer = f"{name}.block.N.layer"
    return {
        **t5_attention(f"{layer}.0.SelfAttention"),
        f"{layer}.{feed_forward}.DenseReluDense.wi_0": GATE,
        f"{layer}.{feed_forward}.DenseReluDense.wi_1": UP,
        f"{layer}.{feed_forward}.DenseReluDense.wo": DOWN,
    }


EXPECTED: dict[str, dict[str, Role]] = {
    "bert": bert_like("bert", bert__pooler__dense=OTHER, classifier=OTHER),
    "roberta": bert_like("roberta", classifier__dense=OTHER, classifier__out_proj=OTHER),
    "distilbert": {
        "distilbert.transformer.layer.N.attention.q_lin": Q,
        "distilbert.transformer.layer.N.attention.k_lin": K,
        "distilbert.transformer.layer.N.attention.v_lin": V,
        "distilbert.transformer.layer.N.attention.out_lin": OUT,
        "distilbert.transformer.layer.N.ffn.lin1": UP,
        "distilbert.transformer.layer.N.ffn.lin2": DOWN,
        "pre_classifier": OTHER,
        "classifier": OTHER,
    },
    "deberta": {
        "deberta.encoder.layer.N.attention.self.query_proj": Q,
        "deberta.encoder.layer.N.attention.self.key_proj": K,
        "deberta.encoder.layer.N.attention.self.value_proj": V,
        "deberta.encoder.layer.N.attention.self.pos_key_proj": OTHER,
        "deberta.encoder.layer.N.attention.self.pos_query_proj": OTHER,
        "deberta.encoder.layer.N.attention.output.dense": OUT,
        "deberta.encoder.layer.N.intermediate.dense": UP,
        "deberta.encoder.layer.N.output.dense": DOWN,
        "pooler.dense": OTHER,
        "classifier": OTHER,
    },
    "t5": {
        **t5_stack("encoder", 1),
        **t5_stack("decoder", 2),
        **t5_attention("decoder.block.N.layer.1.EncDecAttention"),
        "lm_head": OTHER,
    },
    "vit": {
        "vit.layers.N.attention.q_proj": Q,
        "vit.layers.N.attention.k_proj": K,
        "vit.layers.N.attention.v_proj": V,
        "vit.layers.N.attention.o_proj": OUT,
        "vit.layers.N.mlp.fc1": UP,
        "vit.layers.N.mlp.fc2": DOWN,
        "classifier": OTHER,
    },
    "clip": {
        **clip_tower("text"),
        **clip_tower("vision"),
        "visual_projection": OTHER,
        "text_projection": OTHER,
    },
    **dict.fromkeys(["llama", "tied_llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"], LLAMA),
    "phi": {
        "model.layers.N.self_attn.q_proj": Q,
        "model.layers.N.self_attn.k_proj": K,
        "model.layers.N.self_attn.v_proj": V,
        "model.layers.N.self_attn.dense": OUT,
        "model.layers.N.mlp.fc1": UP,
        "model.layers.N.mlp.fc2": DOWN,
        "lm_head": OTHER,
    },
    "phi3": {
        "model.layers.N.self_attn.qkv_proj[query]": Q,
        "model.layers.N.self_attn.qkv_proj[key]": K,
        "model.layers.N.self_attn.qkv_proj[value]": V,
        "model.layers.N.self_attn.o_proj": OUT,
        "model.layers.N.mlp.gate_up_proj[gate]": GATE,
        "model.layers.N.mlp.gate_up_proj[up]": UP,
        "model.layers.N.mlp.down_proj": DOWN,
        "lm_head": OTHER,
    },
    "opt": {
        "model.decoder.layers.N.self_attn.q_proj": Q,
        "model.decoder.layers.N.self_attn.k_proj": K,
        "model.decoder.layers.N.self_attn.v_proj": V,
        "model.decoder.layers.N.self_attn.out_proj": OUT,
        "model.decoder.layers.N.fc1": UP,
        "model.decoder.layers.N.fc2": DOWN,
        "lm_head": OTHER,
    },
    "gpt2": {
        "transformer.h.N.attn.c_attn[query]": Q,
        "transformer.h.N.attn.c_attn[key]": K,
        "transformer.h.N.attn.c_attn[value]": V,
        "transformer.h.N.attn.c_proj": OUT,
        "transformer.h.N.mlp.c_fc": UP,
        "transformer.h.N.mlp.c_proj": DOWN,
        "lm_head": OTHER,
    },
    "neox": {
        "gpt_neox.layers.N.attention.query_key_value[query]": Q,
        "gpt_neox.layers.N.attention.query_key_value[key]": K,
        "gpt_neox.layers.N.attention.query_key_value[value]": V,
        "gpt_neox.layers.N.attention.dense": OUT,
        "gpt_neox.layers.N.mlp.dense_h_to_4h": UP,
        "gpt_neox.layers.N.mlp.dense_4h_to_h": DOWN,
        "lm_head": OTHER,
    },
    "bloom": FALCON,
    "falcon": FALCON,
    "falcon40b": FALCON,
    "codegen": {
        "transformer.h.N.attn.qkv_proj[query]": Q,
        "transformer.h.N.attn.qkv_proj[key]": K,
        "transformer.h.N.attn.qkv_proj[value]": V,
        "transformer.h.N.attn.out_proj": OUT,
        "transformer.h.N.mlp.fc_in": UP,
        "transformer.h.N.mlp.fc_out": DOWN,
        "lm_head": OTHER,
    },
    "mixtral": {
        "model.layers.N.self_attn.q_proj": Q,
        "model.layers.N.self_attn.k_proj": K,
        "model.layers.N.self_attn.v_proj": V,
        "model.layers.N.self_attn.o_proj": OUT,
        "model.layers.N.mlp.experts.gate_up_proj[N.gate]": GATE,
        "model.layers.N.mlp.experts.gate_up_proj[N.up]": UP,
        "model.layers.N.mlp.experts.down_proj[N.down]": DOWN,
        "lm_head": OTHER,
    },
    "mamba": {
        "backbone.layers.N.mixer.in_proj": OTHER,
        "backbone.layers.N.mixer.x_proj": OTHER,
        "backbone.layers.N.mixer.dt_proj": OTHER,
        "backbone.layers.N.mixer.out_proj": OTHER,
        "lm_head": OTHER,
    },
    "torch_encoder": {
        "encoder.layers.N.self_attn.in_proj_weight[query]": Q,
        "encoder.layers.N.self_attn.in_proj_weight[key]": K,
        "encoder.layers.N.self_attn.in_proj_weight[value]": V,
        "encoder.layers.N.self_attn.out_proj": OUT,
        "encoder.layers.N.linear1": UP,
        "encoder.layers.N.linear2": DOWN,
        "head": OTHER,
    },
    "torch_transformer": {
        "transformer.encoder.layers.N.self_attn.in_proj_weight[query]": Q,
        "transformer.encoder.layers.N.self_attn.in_proj_weight[key]": K,
        "transformer.encoder.layers.N.self_attn.in_proj_weight[value]": V,
        "transformer.encoder.layers.N.self_attn.out_proj": OUT,
        "transformer.encoder.layers.N.linear1": UP,
        "transformer.encoder.layers.N.linear2": DOWN,
        "transformer.decoder.layers.N.self_attn.in_proj_weight[query]": Q,
        "transformer.decoder.layers.N.self_attn.in_proj_weight[key]": K,
        "transformer.decoder.layers.N.self_attn.in_proj_weight[value]": V,
        "transformer.decoder.layers.N.self_attn.out_proj": OUT,
        "transformer.decoder.layers.N.multihead_attn.in_proj_weight[query]": Q,
        "transformer.decoder.layers.N.multihead_attn.in_proj_weight[key]": K,
        "transformer.decoder.layers.N.multihead_attn.in_proj_weight[value]": V,
        "transformer.decoder.layers.N.multihead_attn.out_proj": OUT,
        "transformer.decoder.layers.N.linear1": UP,
        "transformer.decoder.layers.N.linear2": DOWN,
        "head": OTHER,
    },
    "perceptron": {"layers.N": OTHER, "head": OTHER},
}


def generic(name: str) -> str:
    """A name without layer and expert numbers; T5 numbers the parts of a block, which stay."""
    name = re.sub(r"\b(layer|layers|h|block)\.\d+", r"\1.N", name, count=1)
    return re.sub(r"\[\d+\.", "[N.", name)


@pytest.mark.parametrize("family", EXPECTED)
def test_roles(family: str) -> None:
    found = find_projections(zoo.build(family))
    assert {generic(p.name): p.role for p in found} == EXPECTED[family]


@pytest.mark.parametrize("family", EXPECTED)
def test_names_are_unique_and_weights_have_the_stated_shape(family: str) -> None:
    model = zoo.build(family)
    found = find_projections(model)
    assert len({p.name for p in found}) == len(found) == len(set(found))
    for p in found:
        assert p.weight(model).shape == p.shape
        assert not p.weight(model).requires_grad


def test_a_weight_is_a_view_not_a_copy() -> None:
    model = zoo.build("gpt2")
    key = next(p for p in find_projections(model) if p.name == "transformer.h.0.attn.c_attn[key]")
    stored = model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(key.weight(model), stored[:, 32:64].T)
    assert key.weight(model).untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


def test_fused_blocks_are_what_the_model_computes() -> None:
    model, x = zoo.build("gpt2"), torch.randn(2, 32)
    c_attn = model.transformer.h[0].attn.c_attn
    parts = dict(zip("query key value".split(), c_attn(x).split(32, -1), strict=True))
    for p in find_projections(model):
        if p.module.endswith("h.0.attn.c_attn"):
            bias = c_attn.bias[slice(*p.rows)]
            torch.testing.assert_close(x @ p.weight(model).T + bias, parts[p.role])


def test_fused_rows_can_be_told() -> None:
    fused = {"qkv_proj": {"query": 32, "key": 16, "value": 16}}
    found = [
        p for p in find_projections(zoo.build("phi3"), fused) if "layers.0" in p.name and "qkv" in p.name
    ]
    assert [(p.role, p.rows) for p in found] == [(Q, (0, 32)), (K, (32, 48)), (V, (48, 64))]


def test_fused_rows_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="must add up to the 64 rows"):
        find_projections(zoo.build("phi3"), {"qkv_proj": {"query": 32, "key": 16, "value": 8}})


def test_interleaved_blocks_are_what_the_model_computes() -> None:
    model, x = zoo.build("neox"), torch.randn(5, 32)
    assert not any(scan(model).values())
    layer = model.gpt_neox.layers[0].attention.query_key_value
    parts = layer(x).view(5, 4, 24).chunk(3, dim=-1)  # as GPTNeoXAttention.forward has it, of four heads
    for p in find_projections(model):
        if p.module.endswith("layers.0.attention.query_key_value"):
            y = x @ p.weight(model).T + layer.bias[numbers(p.rows)]
            torch.testing.assert_close(y, parts["query key value".split().index(p.role)].flatten(1))


def test_interleaved_rows_are_not_told_as_blocks() -> None:
    told = {"query_key_value": {"query": 32, "key": 32, "value": 32}}
    with pytest.raises(ValueError, match="head by head, and is divided so without fused=: leave it out"):
        scan(zoo.build("neox"), told)
    right = {"query_key_value": {"groups": 4, "query": 8, "key": 8, "value": 8}}
    assert find_projections(zoo.build("neox"), right) == find_projections(zoo.build("neox"))


def test_separate_attention_widths() -> None:
    model = nn.ModuleDict({"cross": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    found = {p.role: p for p in find_projections(model)}
    assert [found[r].shape for r in (Q, K, V)] == [(8, 8), (8, 6), (8, 4)]
    assert found[K].name == "cross.k_proj_weight"


def test_shared_modules_are_found_once() -> None:
    shared = nn.Linear(4, 4)
    assert len(find_projections(nn.ModuleList([shared, nn.ReLU(), shared]))) == 1


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("llama", {"lm_head"}),
        ("tied_llama", {"lm_head"}),
        ("bert", {"classifier"}),
        ("t5", {"lm_head"}),
        ("torch_encoder", {"head"}),
        ("perceptron", {"head"}),
    ],
)
def test_heads(family: str, heads: set[str]) -> None:
    assert output_heads(zoo.build(family)).keys() == heads


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_heads_are_known_inside_another_module(family: str) -> None:
    inner = zoo.build(family)
    outer = nn.ModuleDict({"net": nn.ModuleDict({"model": inner})})
    assert output_heads(outer).keys() == {f"net.model.{path}" for path in output_heads(inner)} != set()


def test_experts_stored_the_other_way_round_are_told_by_their_shapes() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 8))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 6))

    model = nn.ModuleList([Experts()])
    with torch.no_grad():
        model[0].gate_up_proj.copy_(torch.arange(96.0).view(2, 6, 8))
    found = find_projections(model)
    assert [(p.role, p.rows, p.shape) for p in found[:4]] == [
        (GATE, (0, 4), (4, 6)), (UP, (4, 8), (4, 6)), (GATE, (8, 12), (4, 6)), (UP, (12, 16), (4, 6)),
    ]  # fmt: skip
    assert torch.equal(found[3].weight(model), model[0].gate_up_proj[1, :, 4:].T)


def test_experts_whose_shapes_do_not_fit_are_undivided() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 8))
            self.down_proj = nn.Parameter(torch.zeros(2, 5, 6))

    (doubt,) = scan(nn.ModuleList([Experts()])).values()
    assert doubt is not None and not doubt.adaptable
    assert "stored neither as (experts, out, in) nor as" in doubt.reason


def test_names_of_other_families() -> None:
    assert role_of("layers.0.attention.wo") == OUT
    assert role_of("layers.0.feed_forward.w1") == GATE
    assert role_of("layers.0.feed_forward.w2") == DOWN
    assert role_of("blocks.0.attn.proj") == OUT
    assert role_of("transformer_blocks.0.attn1.to_out.0") == OUT
    assert role_of("anything.else") == OTHER


def test_a_label_is_not_identity() -> None:
    plain = Projection("a", "weight", (0, 4), Q, 4, 4)
    assert plain == Projection("a", "weight", (0, 4), Q, 4, 4, "query")
    assert plain.name == "a"
