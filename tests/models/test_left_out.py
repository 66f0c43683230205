"""What all-linear and roles leave out, and that the plan says it: heads, routers, layers of another kind."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lowrank
from lowrank import Policy, plan_model, presets, wrap_model
from lowrank.models.families import Role, role_of
from lowrank.models.heads import output_heads
from lowrank.models.projections import find_projections, scan
from lowrank.models.targets import select
from tests.helpers import frozen_logits, perturb
from tests.zoo import DECODER, VISION, build


def modules(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    return [p.module for p in select(model, *args, **kwargs).projections]


def notes(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    return "\n".join(select(model, *args, **kwargs).notes)


def chain(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def linear() -> nn.Module:
    return nn.Linear(4, 4)


# -- output heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fc", "score", "head", "cls", "classifier"])
def test_a_name_makes_no_head_where_nothing_else_is_left(name: str) -> None:
    assert modules(chain(**{name: linear()}), "all-linear") == [name]
    several = chain(**{name: chain(first=linear(), last=linear())})
    assert modules(several, "all-linear") == [f"{name}.first", f"{name}.last"]


def test_a_head_told_by_its_name_is_said_in_the_plan() -> None:
    model = chain(body=linear(), fc=linear())
    plan = plan_model(model, Policy(rank=2))
    assert [p.module for p in plan] == ["body"]
    assert plan.notes == ("fc: left out: an output head (called 'fc')",)
    assert "note: fc: left out: an output head" in str(plan)
    assert notes(model, "all-linear", exclude="fc") == "", "what was excluded needs no note"
    assert notes(model, "all-linear", train="fc") == "", "nor what is trained in full"
    assert notes(model, ["all-linear", "fc"]) == ""


def test_a_decoders_output_projection_is_a_head_wherever_it_is() -> None:
    model = chain(
        decoder=chain(body=linear(), output_projection=linear(), attn=chain(output_projection=linear()))
    )
    assert output_heads(model) == {"decoder.output_projection": "called 'output_projection'"}


def test_a_layer_called_head_is_one_where_it_scores_words() -> None:
    joint = chain(joint=chain(head=linear()), ctc_head=linear(), body=linear())
    joint.config = transformers.LlamaConfig(vocab_size=4)
    assert output_heads(joint) == {"joint.head": "called 'head'", "ctc_head": "called 'ctc_head'"}
    joint.config = transformers.LlamaConfig(vocab_size=5)
    assert output_heads(joint) == {"ctc_head": "called 'ctc_head'"}, "it has other rows than words"


def test_output_embeddings_and_tied_weights_are_said_in_the_plan() -> None:
    assert "lm_head: left out: an output head (the model's output embeddings)" in notes(
        build("llama"), "all-linear"
    )
    assert "lm_head: left out: an output head (its weight is tied to an embedding)" in notes(
        build("tied_llama"), "all-linear"
    )


def test_an_encoder_is_no_head_whatever_it_is_called() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = chain(stem=nn.Linear(4, 8), head=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert {p.role for p in select(model, "all-linear").projections} >= {Role.QUERY, Role.UP}
    deep = chain(stem=linear(), head=chain(**{f"block{i}": linear() for i in range(6)}))
    assert len(modules(deep, "all-linear")) == 7
    assert output_heads(deep) == {}


def test_an_attention_pooling_is_no_output_head() -> None:
    text = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    config = transformers.SiglipConfig(text_config=text, vision_config={**VISION, "num_hidden_layers": 1})
    chosen = select(transformers.SiglipModel(config), "all-linear").projections
    assert {p.name.rpartition("head.")[2] for p in chosen if "vision_model.head" in p.name} == {
        "attention.in_proj_weight[query]", "attention.in_proj_weight[key]", "attention.in_proj_weight[value]",
        "attention.out_proj", "mlp.fc1", "mlp.fc2",
    }  # fmt: skip
    assert "text_model.head" in [p.module for p in chosen], "it projects what a tower pooled"


def test_a_model_of_nothing_but_heads_says_so_without_an_empty_exclude() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.out.weight = self.embed.weight

    with pytest.raises(
        ValueError, match=r"^the model has nothing of target='all-linear' .out: left out: an out"
    ):
        select(Tied(), "all-linear")
    assert modules(Tied(), "out") == ["out"]
    with pytest.raises(ValueError, match=r"^exclude=\['fc'\] leaves nothing of target='all-linear'$"):
        select(chain(fc=linear()), "all-linear", exclude="fc")


# -- layers whose forward is more than a product ------------------------------------------------------------


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Narrow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., ::2]


class Needy(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class Constrained(nn.Linear):
    """Rescales its own weight when it is called, as constrained layers of EEG models do."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        self.weight.data.mul_(2)
        return super().forward(x)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Flat(nn.Linear):
    """Takes tokens only, without a batch."""

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = x.shape
        return super().forward(x).view(tokens, -1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Pair(4, 4), "returns a tuple and not a tensor"),
        (Narrow(4, 4), r"gives .* not"),
        (Needy(4, 4), "missing 1 required positional argument: 'scale'"),
    ],
)
def test_a_layer_that_is_more_than_a_product_is_left_out_with_the_reason(
    layer: nn.Module, reason: str
) -> None:
    model = chain(body=linear(), other=layer)
    assert modules(model, "all-linear") == ["body"]
    with pytest.raises(
        ValueError,
        match=f"other: the forward of {type(layer).__name__} .*{reason}.*cannot be adapted.*exclude=",
    ):
        select(model, "other")
    plan = plan_model(model, Policy(rank=2))
    assert len(plan.notes) == 1 and plan.notes[0].startswith(
        f"other: left out: the forward of {type(layer).__name__}"
    )


@pytest.mark.parametrize("layer", [Scaled(4, 4), Flat(4, 4)])
def test_a_layer_with_a_forward_of_its_own_that_gives_its_rows_is_adapted(layer: nn.Module) -> None:
    model = wrap_model(chain(body=linear(), other=layer), presets.lora(rank=2), progress=False)
    perturb(model)(torch.randn(3, 4)).sum().backward()
    assert {path for path in lowrank.adapted_layers(model)} == {"body", "other"}


def test_trying_a_layer_leaves_its_weight_and_the_random_state_alone() -> None:
    layer = Constrained(4, 4)
    model, before, state = chain(body=linear(), other=layer), layer.weight.clone(), torch.get_rng_state()
    storage = layer.weight.data_ptr()
    assert modules(model, "all-linear") == ["body", "other"]
    assert torch.equal(layer.weight, before) and layer.weight.data_ptr() == storage
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_on_the_meta_device_is_not_called() -> None:
    class Uncallable(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            pytest.fail("called on the meta device")

    assert modules(chain(one=Uncallable(4, 4, device="meta")), "all-linear") == ["one"]


def test_ibert_leaves_its_quantized_layers_out() -> None:
    config = transformers.IBertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.IBertForSequenceClassification(config)
    with pytest.raises(
        ValueError, match=r"has nothing of target='all-linear' .*left out: the forward of QuantLin"
    ):
        select(model, "all-linear")
    assert modules(model, "classifier.dense") == ["classifier.dense"]


# -- routers and indexers ------------------------------------------------------------------------------------


def phimoe() -> nn.Module:
    config = transformers.PhimoeConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    return transformers.PhimoeForCausalLM(config).eval()


def llama4() -> nn.Module:
    sizes = {**DECODER, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4}
    config = transformers.Llama4TextConfig(
        **sizes, num_experts_per_tok=1, moe_layers=[0, 1], rope_scaling=None
    )
    return transformers.Llama4ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [phimoe, llama4])
def test_a_router_that_returns_a_tuple_is_left_out(make: Any) -> None:
    """A default wrap ran into the router's tuple at the first call."""
    model = make()
    with pytest.raises(ValueError, match="router.*returns a tuple.*cannot be adapted"):
        select(model, "router")
    batch = {"input_ids": torch.arange(14).view(2, 7)}
    before = frozen_logits(model, batch)
    wrap_model(model, presets.lora(rank=2), progress=False)
    assert "router (2): left out" in "\n".join(lowrank.plan_of(model).notes)
    assert torch.equal(frozen_logits(model, batch), before)
    perturb(model)
    assert not torch.allclose(frozen_logits(model, batch), before)


def test_what_chooses_experts_is_adapted_by_name_only() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.ModuleDict({"wg": linear()})
            self.shared_expert_gate, self.router = nn.Linear(4, 1), linear()
            self.experts = nn.ModuleList([linear(), linear()])

    model = chain(gate=linear(), mlp=Mixture())
    assert modules(model, "all-linear") == ["gate", "mlp.experts.0", "mlp.experts.1"]
    assert notes(model, "all-linear").count("left out: it chooses experts") == 1
    assert modules(model, ["wg", "shared_expert_gate"]) == ["mlp.gate.wg", "mlp.shared_expert_gate"]
    indexed = chain(self_attn=chain(q_proj=linear(), indexer=chain(wk=linear(), kv_proj=linear())))
    assert modules(indexed, "all-linear") == ["self_attn.q_proj"]
    reason = "left out: it chooses tokens, and no gradient reaches it"
    assert f"self_attn.indexer.wk, self_attn.indexer.kv_proj: {reason}" in notes(indexed, "all-linear")
    with pytest.raises(ValueError, match="target='key' matches no projection"):
        select(indexed, "key")


# -- roles and what they leave out ---------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(8, 16), nn.Linear(8, 8)


def towers() -> nn.Module:
    """A tower with separate projections beside one whose fused weight nothing divides."""
    split = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
    return nn.ModuleDict(
        {"vision": nn.ModuleDict({"self_attn": split}), "text": nn.ModuleDict({"self_attn": Fused()})}
    )


def test_a_role_that_would_leave_a_tower_out_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"text.self_attn.qkv_proj: it is not known.*fused=.*exclude=\('qkv_proj',\)"
    ):
        plan_model(towers(), presets.ailora(rank=2))
    plan = plan_model(towers(), presets.ailora(rank=2, exclude=("qkv_proj",)))
    assert {p.module for p in plan} == {"vision.self_attn.q_proj", "vision.self_attn.v_proj"}
    told = {"qkv_proj": {"query": 8, "key": 4, "value": 4}}
    plan = plan_model(towers(), presets.ailora(rank=2, fused=told))
    assert [p.name for p in plan if "text" in p.name] == [
        "text.self_attn.qkv_proj[query]",
        "text.self_attn.qkv_proj[value]",
    ]
    assert modules(towers(), "output") == ["vision.self_attn.out_proj", "text.self_attn.o_proj"]


def test_a_predicate_that_leaves_an_undivided_weight_out_has_a_note() -> None:
    assert "text.self_attn.qkv_proj: left out, and it is not known" in notes(
        towers(), lambda p: p.role == Role.QUERY
    )
    assert "adapted as a whole" in notes(towers(), lambda p: True)


def test_a_role_target_says_which_layers_have_no_known_role() -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": linear(), "mystery": linear()})})
    assert notes(model, "query") == (
        "attn.mystery: left out, since its role is not known: give it with roles={pattern: role}"
    )
    assert notes(model, "q_proj") == ""


def test_experts_of_another_layout_are_left_out_and_said() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 8))
            self.down_proj = nn.Parameter(torch.zeros(2, 5, 6))

    model = nn.ModuleDict({"q_proj": linear(), "experts": Experts()})
    assert modules(model, "all-linear") == ["q_proj"]
    assert "experts: left out: its experts are stored neither as (experts, out, in)" in notes(
        model, "all-linear"
    )
    with pytest.raises(ValueError, match="cannot be adapted: leave it out with exclude="):
        select(model, "experts")
    with pytest.raises(ValueError, match=r"target='up' may mean .*exclude=\('gate_up_proj',\)"):
        select(model, "up")


def test_matrices_that_no_linear_layer_holds_are_said() -> None:
    class Ungated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = (nn.Parameter(torch.zeros(2, 4, 4)) for _ in range(2))
            self.pos_embed, self.scale = nn.Parameter(torch.zeros(1, 4, 4)), nn.Parameter(torch.zeros(1, 4))

    model = chain(body=linear(), lstm=nn.LSTM(4, 4), conv=nn.Conv1d(4, 4, 3), embed=nn.Embedding(4, 4))
    model.experts = Ungated()
    held = "lstm.weight_ih_l0, lstm.weight_hh_l0, experts.up_proj, experts.down_proj, experts.pos_embed"
    assert select(model, "all-linear").notes == [
        f"{held}: left out: no linear layer holds it",
        "conv: left out: convolutions are not adapted",
    ]
    assert "lstm" not in notes(model, "all-linear", exclude="lstm")
    assert notes(model, "body") == ""
    assert notes(build("torch_encoder"), "all-linear").count("no linear layer") == 0, "attention is covered"


# -- roles by name -------------------------------------------------------------------------------------------

NAMES = {
    Role.QUERY: "encoder.layer.0.attention.self.query_global · self_attn.q_proj.linear · attn.add_q_proj · "
    "self_attn.q_a_proj · self_attn.q_b_proj · attention.attention.projection_query "
    "· rwkv.attention.receptance · attention.self.w2e_query · attention.self.layout_query · attention.q_head "
    "· self_attention.project_q · self_attn.q_gate_proj · attn.to_query · layers.0.queries.linear",
    Role.KEY: "attn.add_k_proj · attention.self.key_global · blocks.0.attention.key · attention.k_head "
    "· self_attention.project_k",
    Role.VALUE: "attn.add_v_proj · attention.self.value_global · attn.values_text_proj · attention.v_head",
    Role.OUTPUT: "self_attn.output_proj · self_attn.linear_out · self_attn.projection "
    "· attention.projection_layer · encoder.layer.0.attention.output · mixer.o_proj · attn.to_add_out "
    "· conformer.0.attention.post · attn.out_vision_proj · attention.post_proj · self_attn.o_a_proj "
    "· self_attention.attention_out",
    Role.UP: "feed_forward.intermediate_dense · mlp.linear_fc1 · mlp.fc_in · stages.0.layers.0.pwconv1 · "
    "mlp.proj_in · mlp.dense1 · albert_layers.0.ffn · blocks.0.feed_forward.key · layers.0.mlp.in_proj "
    "· layers.0.feed_forward1.ffw_layer_1.linear · layer.0.intermediate_query.dense "
    "· x_layers.0.lang_inter.dense · layer.0.layout_intermediate.dense · adapter.up_proj_for_speech",
    Role.DOWN: "feed_forward.output_dense · mlp.linear_fc2 · mlp.fc_out · stages.0.layers.0.pwconv2 · "
    "mlp.proj_out · mlp.dense2 · albert_layers.0.ffn_output · blocks.0.feed_forward.value · mlp.out_proj · "
    "layers.0.feed_forward1.ffw_layer_2.linear · layer.0.output_query.dense · ffn.ffn.w_out · "
    "x_layers.0.visn_output.dense · adapter.down_proj_for_speech · "
    "shared_mlp.output_linear · transformer_blocks.0.ff.net.2",
    Role.GATE: "mlp.gate_proj · blocks.0.feed_forward.receptance · ffn.ffn.w_in.w_0",
    Role.OTHER: "self_attn.gate_proj · attentions.0.transformer_blocks.0.ff.net.0.proj · "
    "bert.pooler.dense · proj_out · self_attn.relative_k_proj · self_attn.output_gate · "
    "self_attn.linear_pos · attention.self.conv_out_layer · self_attn.attention_weights · "
    "layers.0.downsample.reduction · mixer.in_proj · mixer.out_proj",
}


@pytest.mark.parametrize(
    ("path", "role"), [(path, role) for role, paths in NAMES.items() for path in paths.split(" · ")]
)
def test_a_role_by_name(path: str, role: Role) -> None:
    assert role_of(path) == role


def test_an_attention_is_told_by_its_keys_and_values_too() -> None:
    pooling = chain(q_proj=linear(), k_proj=linear(), v_proj=linear(), output_proj=linear())
    pooled = chain(body=linear(), head=pooling)
    assert modules(pooled, "output") == ["head.output_proj"]
    assert "head.k_proj" in modules(pooled, "all-linear"), "what attends is no output head"
    as_list = chain(to_q=linear(), to_kv=nn.Linear(4, 8), to_out=nn.Sequential(linear()))
    assert modules(chain(block=as_list), "output", exclude="to_kv") == ["block.to_out.0"]


def test_a_fused_weight_in_a_wrapper_is_one() -> None:
    wrapped = chain(queries_keys_values=chain(linear=nn.Linear(4, 16)), q_proj=linear())
    with pytest.raises(ValueError, match="queries_keys_values.linear: it is not known where query"):
        select(chain(attention=wrapped), "query")


def test_latent_attention_has_a_query_and_no_value() -> None:
    sizes = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    config = transformers.DeepseekV3Config(
        **{**DECODER, "num_hidden_layers": 1}, **sizes, first_k_dense_replace=1
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    assert [name.rpartition(".")[2] for name in modules(model, "query")] == ["q_a_proj", "q_b_proj"]
    for target in ("key", "value"):
        with pytest.raises(ValueError, match="kv_a_proj_with_mqa: .*of one latent"):
            select(model, target)
    whole = {p: doubt for p, doubt in scan(model).items() if "kv_" in p.module}
    assert len(whole) == 2 and all(p.role == Role.OTHER and doubt for p, doubt in whole.items())
    assert set(whole) <= set(select(model, "all-linear").projections) <= set(find_projections(model))


def test_convolutions_are_said_to_be_left_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    plan = lowrank.plan_model(net, presets.lora(rank=2))
    assert [note for note in plan.notes if "convolution" in note] == [
        "0: left out: convolutions are not adapted"
    ]
    by_name = lowrank.plan_model(net, presets.lora(rank=2, target="2"))
    assert not any("convolution" in note for note in by_name.notes)
