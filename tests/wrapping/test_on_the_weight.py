"""Weights that no Linear holds: attention of PyTorch, adapted on the weight, and experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from lowrank import presets
from lowrank.layers.weight import AdaptedWeight
from lowrank.models.projections import Role
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb, wrapped


def test_the_fast_path_of_the_torch_encoder_sees_the_adapters() -> None:
    model, batch = perturb(wrapped("torch_encoder", presets.lora(rank=2))), zoo.batch("torch_encoder")
    fast = logits(model, batch)
    with torch.enable_grad():
        slow = model(**batch).logits.detach()
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    with lowrank.disable_adapters(model):
        assert not torch.allclose(logits(model, batch), fast, atol=1e-3)


def test_a_module_adapted_on_the_weight_is_still_what_it_was() -> None:
    model = wrapped("torch_encoder", presets.lora(rank=2))
    attention = model.encoder.layers[0].self_attn
    assert isinstance(attention, nn.MultiheadAttention) and isinstance(attention, AdaptedWeight)
    plain = dict(zoo.build("torch_encoder").named_parameters())
    assert {n for n, _ in model.named_parameters() if "lora" not in n} == set(plain)
    delta = attention.delta_weight("in_proj_weight")
    assert delta.shape == (96, 32) and not delta.any()


def test_experts_learn() -> None:
    model, batch = zoo.build("mixtral"), zoo.batch("mixtral")
    base = frozen_logits(model, batch)
    lowrank.wrap_model(model, presets.pissa(rank=2, target="mlp.experts.*"), progress=False)
    assert torch.equal(logits(model, batch), base)
    model(**batch).loss.backward()
    roles = {p.role for p in lowrank.plan_of(model).adapted}
    assert roles == {Role.GATE, Role.UP, Role.DOWN}
    assert any(p.grad is not None and p.grad.any() for p in lowrank.adapter_parameters(model))
    trained = logits(perturb(model), batch)
    assert (trained - base).abs().max() > 0.05
    torch.testing.assert_close(logits(lowrank.merge(model), batch), trained, rtol=1e-4, atol=1e-4)


def test_the_update_and_the_weight_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """W + ΔW of attention in fp32: ``addmm`` on W, with no ΔW of its own; the values are those of the sum."""
    model = perturb(wrapped("torch_encoder", presets.lora(rank=2)))
    attention = model.encoder.layers[0].self_attn
    wanted = attention._parameters["in_proj_weight"] + attention.delta_weight("in_proj_weight")
    monkeypatch.setattr("lowrank.layers.weight.updates", None)  # which would form ΔW
    torch.testing.assert_close(attention.in_proj_weight, wanted, rtol=1e-5, atol=1e-6)
