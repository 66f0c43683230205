"""Experts: the products that transformers makes with their tensors, adapted where they are made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.layers import experts as experts_layer
from lowrank.layers.weight import AdaptedWeight
from lowrank.models.projections import Role
from tests.helpers import frozen_logits, logits, numbers, perturb
from tests.zoo import DECODER

SIZES = {**DECODER, "num_hidden_layers": 1}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **MOE, head_dim=8))


def olmoe() -> nn.Module:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2))


def granite_moe() -> nn.Module:
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def deepseek_v3() -> nn.Module:
    sizes = {**SIZES, "num_key_value_heads": SIZES["num_attention_heads"]}
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **sizes, **LATENT, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, first_k_dense_replace=0,
        )
    )  # fmt: skip


def gpt_oss() -> nn.Module:
    config = hf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    return hf.GptOssForCausalLM(config)


def privacy_filter() -> nn.Module:
    """As GPT-OSS, but it multiplies by ``weight[expert].float()``."""
    rope = dict(rope_type="default", rope_theta=1e4)
    config = hf.OpenAIPrivacyFilterConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, rope_parameters=rope
    )
    return hf.OpenAIPrivacyFilterForTokenClassification(config)


def aria() -> nn.Module:
    config = hf.AriaTextConfig(**SIZES, head_dim=8, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    return hf.AriaTextForCausalLM(config)


def dbrx() -> nn.Module:
    """Experts in two dimensions, which the module above them multiplies by."""
    config = hf.DbrxConfig(
        d_model=32, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )  # fmt: skip
    model = hf.DbrxForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith((".w1", ".v1", ".w2")):
            nn.init.normal_(parameter, std=0.1)
    return model


def llama4() -> nn.Module:
    config = hf.Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1,
        moe_layers=[0], rope_scaling=None,
    )  # fmt: skip
    return hf.Llama4ForCausalLM(config)


def ungated() -> nn.Module:
    """NemotronH's experts, which have no gate, beneath a router of one choice."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = hf.NemotronHConfig(
                hidden_size=32, n_routed_experts=4, moe_intermediate_size=16, moe_latent_size=None
            )
            config._experts_implementation = "eager"
            self.config, self.embed, self.experts = config, nn.Embedding(99, 32), NemotronHExperts(config)
            self.set_experts_implementation = lambda name: setattr(config, "_experts_implementation", name)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=0.1)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids).flatten(0, 1)
            chosen = torch.stack([input_ids.flatten() % 3, input_ids.flatten() % 3 + 1], 1)
            return self.experts(x, chosen, torch.full(chosen.shape, 0.5))

    return Net()


MODELS = {
    each.__name__: each
    for each in (
        mixtral,
        qwen3_moe,
        olmoe,
        granite_moe,
        deepseek_v3,
        gpt_oss,
        privacy_filter,
        aria,
        dbrx,
        llama4,
        ungated,
    )
}
WAYS = ("eager", "grouped_mm", "batched_mm")
EAGER = ("llama4", "dbrx")  # they have one form of their own
TRANSPOSED = ("aria", "gpt_oss", "privacy_filter", "llama4")
CASES = [(name, way) for name in MODELS for way in WAYS if name not in EAGER or way == "eager"]


def build(name: str, way: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3 and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    if name not in EAGER:
        model.set_experts_implementation(way)
    return model


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))}


def adapted(name: str, way: str, **options: Any) -> nn.Module:
    policy = presets.lora(**{"rank": 3, "target": "experts.*", **options})
    return lowrank.wrap_model(build(name, way), policy, progress=False)


def layers(model: nn.Module) -> Iterator[AdaptedWeight]:
    yield from (module for module in model.modules() if isinstance(module, AdaptedWeight))


def moved_without_full_updates(
    monkeypatch: pytest.MonkeyPatch, name: str, way: str, **options: Any
) -> tuple[nn.Module, Tensor]:
    """A wrapped model that was the base bit for bit and is perturbed now, and its logits; it forms no ΔW."""

    def refused(*_: Any) -> Tensor:
        raise AssertionError("a full ΔW was formed")

    monkeypatch.setattr(experts_layer.LowRank, "whole", refused)
    base = frozen_logits(build(name, way), batch())
    model = adapted(name, way, **options)
    assert torch.equal(logits(model, batch()), base)
    perturb(model)
    moved = logits(model, batch())
    assert (moved - base).abs().max() > 1e-3
    return model, moved


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_wrapped_model_is_the_base_and_computes_as_the_merged_weights_say(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, moved = moved_without_full_updates(monkeypatch, name, way)
    torch.testing.assert_close(logits(lowrank.merge(model), batch()), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_unwrapping_gives_the_base_back(name: str, way: str) -> None:
    base = build(name, way).state_dict()
    model = lowrank.unwrap(perturb(adapted(name, way)))
    state = model.state_dict()
    assert state.keys() == base.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items())


@pytest.mark.parametrize("preset", [presets.lora, presets.pissa])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4", "ungated", "dbrx"])
def test_saving_and_loading(name: str, preset: Any, tmp_path: Path) -> None:
    way = "eager" if name == "llama4" else "grouped_mm"
    model = build(name, way)
    lowrank.wrap_model(model, preset(rank=2, target="experts.*"), progress=False)
    lowrank.save_adapter(perturb(model), tmp_path)
    loaded = lowrank.load_adapter(build(name, way), tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))


def gradients(name: str, way: str, **options: Any) -> list[Tensor]:
    model = perturb(adapted(name, way, **options))
    output = model(**batch())
    (output if isinstance(output, Tensor) else output.logits).square().sum().backward()
    return [parameter.grad for parameter in lowrank.adapter_parameters(model)]


@pytest.mark.parametrize("options", [{}, {"init": lowrank.init.Principal()}], ids=["zero", "anchored"])
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "ungated"])
def test_every_way_has_the_same_gradients(name: str, way: str, options: Any) -> None:
    for got, wanted in zip(gradients(name, way, **options), gradients(name, "eager", **options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        assert wanted.any()


def test_factors_are_one_pair_for_each_kind_of_rows() -> None:
    (experts,) = layers(adapted("qwen3_moe", "grouped_mm"))
    shapes = [tuple(each.shape) for each in experts.lora.parameters()]
    assert shapes == [(4, 3, 32), (4, 16, 3), (4, 3, 32), (4, 16, 3), (4, 3, 16), (4, 32, 3)]


def test_gpt_oss_has_gate_and_up_in_turn() -> None:
    projections = lowrank.find_projections(build("gpt_oss"))
    model = build("gpt_oss")
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    for role, first in ((Role.GATE, 0), (Role.UP, 1)):
        own = [p for p in projections if p.role == role and p.param == "gate_up_proj"]
        assert len(own) == 4
        for expert, p in enumerate(own):
            assert torch.equal(p.weight(model), weight[expert].T[first::2])


def test_dbrx_has_its_roles_by_name_and_each_expert_its_rows() -> None:
    model = build("dbrx")
    mlp = model.transformer.blocks[0].ffn.experts.mlp
    for name, role in (("w1", Role.GATE), ("v1", Role.UP), ("w2", Role.DOWN)):
        own = [p for p in lowrank.find_projections(model) if p.param == name]
        assert len(own) == 4 and {p.role for p in own} == {role}
        for expert, p in enumerate(own):
            rows = mlp._parameters[name][48 * expert : 48 * (expert + 1)]
            assert torch.equal(p.weight(model), rows.T if name == "w2" else rows)


def test_experts_of_different_ranks(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    plan = lowrank.plan_model(model, presets.lora(rank=3, target="experts.*"), progress=False)
    allocations = {
        p: lowrank.plan.Allocation(i % 4, 1.0 + i % 3) for i, p in enumerate(plan)
    }  # rank 0 is left alone
    lowrank.wrap_model(model, lowrank.Plan(allocations), progress=False)
    perturb(model)
    moved = logits(model, batch())
    lowrank.save_adapter(model, tmp_path)
    loaded = lowrank.load_adapter(build("qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(loaded, batch()), moved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(lowrank.merge(model), batch()), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_what_is_kept_for_backward_follows_the_tokens(way: str) -> None:
    """Beside the frozen base: no copy of the experts' tensors, few tokens keep little."""

    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(input_ids=torch.tensor([[1, 2]]))
        assert output.logits.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    model = adapted("qwen3_moe", way)
    (experts,) = layers(model)
    tensors = experts._parameters["gate_up_proj"].nbytes + experts._parameters["down_proj"].nbytes
    assert kept(model) < tensors / 2 + 2 * sum(p.nbytes for p in lowrank.adapter_parameters(model))


def test_two_adapters_act_together() -> None:
    model = perturb(adapted("qwen3_moe", "grouped_mm"))
    lowrank.add_adapter(model, presets.lora(rank=2, target="experts.*"), name="two", progress=False)
    perturb(model)
    lowrank.set_adapters(model, {"default": 0.5, "two": 2.0})
    moved = logits(model, batch())
    lowrank.combine_adapters(model, {"default": 0.5, "two": 2.0}, name="both")
    lowrank.set_adapters(model, "both")
    torch.testing.assert_close(logits(model, batch()), moved, rtol=1e-4, atol=1e-4)


def total(model: nn.Module) -> Tensor:
    output = model(**batch())
    return (output if isinstance(output, Tensor) else output.logits).square().sum()


@pytest.mark.parametrize("experts", ["each", "shared"])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_gradients_are_those_of_the_weights_in_full(name: str, way: str, experts: str) -> None:
    """dB = s·dW·Aᵀ and dA = s·Bᵀ·dW, summed over the experts that share an adapter."""
    model = perturb(adapted(name, way, experts=experts))
    full = lowrank.merge(copy.deepcopy(model)).requires_grad_()
    total(model).backward()
    total(full).backward()
    for p, adapter in lowrank.adapters.adapters_of(model).items():
        A, B = adapter.A.detach(), adapter.B.detach()
        module = full.get_submodule(p.module)
        gradient = module._parameters[p.param].grad
        gradient = gradient.view(4, -1, gradient.shape[-1])
        gradient = gradient.mT if name in TRANSPOSED or p.param == "w2" else gradient
        if p.shared > 1:
            dW = gradient[:, numbers(p.rows)].sum(0)
        else:
            dW = gradient.reshape(-1, p.in_features)[numbers(p.rows)]
        for got, wanted in (
            (adapter.B.grad, adapter.scaling * dW @ A.T),
            (adapter.A.grad, adapter.scaling * B.T @ dW),
        ):
            largest = float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * largest + 1e-7, msg=p.name)


@pytest.mark.parametrize("experts", ["each", "shared"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_compiled_code_adapts_the_products_too(name: str, experts: str) -> None:
    """One graph, in which nothing but views has the size of a tensor of experts."""
    model = perturb(adapted(name, "grouped_mm", experts=experts))
    (layer,) = layers(model)
    stored = {tuple(sorted(layer._parameters[param].shape)) for param in ("gate_up_proj", "down_proj")}
    made: set[tuple[int, ...]] = set()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if node.op != "placeholder" and isinstance(value, Tensor) and not value._is_view():
                made.add(tuple(sorted(value.shape)))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(logits(compiled, batch()), logits(model, batch()), rtol=1e-5, atol=1e-6)
    assert made and not made & stored


@pytest.mark.parametrize("way", WAYS[1:])
def test_compiled_gradients_are_those_of_ordinary_code(way: str) -> None:
    model = perturb(adapted("qwen3_moe", way))
    total(model).backward()
    wanted = [parameter.grad for parameter in lowrank.adapter_parameters(model)]
    model.zero_grad()
    torch.compiler.reset()
    total(torch.compile(model, backend="aot_eager", fullgraph=True)).backward()
    for got, each in zip(lowrank.adapter_parameters(model), wanted, strict=True):
        torch.testing.assert_close(got.grad, each, rtol=1e-3, atol=1e-4 * float(each.abs().max()))
