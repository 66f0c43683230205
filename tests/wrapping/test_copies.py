"""Copies, conversions and state dicts of a wrapped model; what half precision keeps."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb, wrapped

COPIES = ["deepcopy", "pickle", "torch.save"]


def duplicate(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "torch_encoder", "bert"])
def test_copies_are_whole_and_apart(family: str, how: str) -> None:
    train = ("classifier",) if family == "bert" else ()
    model, batch = wrapped(family, presets.ailora(rank=2, train=train)), zoo.batch(family)
    perturb(model)
    wanted = logits(model, batch)
    twin = duplicate(model, how)
    assert torch.equal(logits(twin, batch), wanted)
    assert lowrank.plan_of(twin) == lowrank.plan_of(model)
    lowrank.merge(twin)
    torch.testing.assert_close(logits(twin, batch), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, batch), wanted), "merging a copy broke the original"
    lowrank.unwrap(duplicate(model, how))
    assert torch.equal(logits(model, batch), wanted), "unwrapping a copy broke the original"
    base = zoo.build(family)
    assert torch.equal(frozen_logits(lowrank.unwrap(model), batch), frozen_logits(base, batch))


@pytest.mark.parametrize("family", ["llama", "torch_encoder"])
def test_state_dicts_travel_between_wrapped_models(family: str) -> None:
    policy = presets.pissa(rank=2)
    one, two, batch = wrapped(family, policy), wrapped(family, policy), zoo.batch(family)
    perturb(one)
    assert not torch.equal(logits(one, batch), logits(two, batch))
    two.load_state_dict(one.state_dict())
    assert torch.equal(logits(one, batch), logits(two, batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "torch_encoder", "vit"])
def test_conversion_reaches_everything(family: str) -> None:
    model = wrapped(family, presets.pissa(rank=2)).to(torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    batch = zoo.batch(family, torch.bfloat16)
    assert torch.equal(logits(model, batch), frozen_logits(zoo.build(family, torch.bfloat16), batch))
    moved = wrapped(family, presets.pissa(rank=2)).to("meta")
    assert all(p.is_meta for p in moved.parameters())


def test_masters_are_fp32_on_a_half_precision_base() -> None:
    model = lowrank.wrap_model(zoo.build("llama", torch.bfloat16), presets.lora(rank=2), progress=False)
    assert {p.dtype for p in lowrank.adapter_parameters(model)} == {torch.float32}
    assert logits(model, zoo.batch("llama")).dtype == torch.bfloat16


def test_small_updates_survive_on_a_half_precision_base() -> None:
    """A residual or merged weight in bf16 drops an update of 1e-4 of the weight; an offset keeps it."""
    layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    model = lowrank.wrap_model(nn.Sequential(layer), presets.pissa(rank=4), progress=False)
    (adapted,) = lowrank.adapted_layers(model).values()
    with torch.no_grad():
        for p in lowrank.adapter_parameters(model):
            p.add_(1e-5 * torch.randn(p.shape))
    delta = adapted.delta_weight()
    exact = adapted.adapters["default"][0].product().double()
    assert 0 < delta.norm() / layer.weight.float().norm() < 1e-2
    assert (delta - exact).norm() < 1e-6 * exact.norm()
