"""Merging adds each update once, into the weights that are the model's own, or changes nothing."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import logits, perturb, wrapped


def test_merging_into_experts_that_lie_out_of_order() -> None:
    model, batch = zoo.build("mixtral"), zoo.batch("mixtral")
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.dim() == 3:
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
                assert name in ("gate_up_proj", "down_proj") and not weight.is_contiguous()
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False))
    with torch.no_grad():
        wanted = logits(model, batch)
        torch.testing.assert_close(logits(lowrank.merge(model), batch), wanted, rtol=1e-4, atol=1e-4)


def test_merging_what_is_not_finite_is_refused() -> None:
    model = wrapped()
    next(lowrank.adapter_parameters(model)).data[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        lowrank.merge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "adapters" not in name)


def test_merging_a_shared_module_adds_its_update_once() -> None:
    model, x = zoo.Shared(), torch.randn(3, 8)
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False))
    wanted = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), wanted)


def test_merging_into_a_tied_weight_is_refused_and_nothing_changes() -> None:
    model = wrapped("tied_llama", presets.lora(target=("lm_head", "q_proj"), rank=2))
    perturb(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head is tied to another module's weight"):
        lowrank.merge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert lowrank.adapted_layers(model)
    lowrank.unwrap(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
