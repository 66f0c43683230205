"""Modules in several places, tied weights, modules in plain containers: every place sees the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb, wrapped


def test_a_shared_module_is_adapted_once_and_stays_shared() -> None:
    model, x = zoo.Shared(), torch.randn(3, 8)
    before = frozen_logits(model, x)
    original = model.first
    lowrank.wrap_model(model, presets.pissa(rank=2), progress=False)
    assert len(lowrank.adapted_layers(model)) == 2
    assert model.first is model.second is model.inner[0]
    assert torch.equal(logits(model, x), before)
    model(x).square().sum().backward()  # one layer used three times in a graph
    assert all(p.grad is not None for p in lowrank.adapter_parameters(model))
    lowrank.unwrap(model)
    assert model.first is model.second is model.inner[0] is original


class Aside(nn.Module):
    """Calls its layers by way of a plain list, a tuple or an attribute that hides them from `modules`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.__dict__["hidden"] = {
            "list": [self.a, self.b],
            "tuple": ((self.a,), self.b),
            "attribute": self.a,
        }[kind]
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attribute":
            return self.b(self.hidden(x))
        first, second = self.hidden
        return second(first[0](x) if self.kind == "tuple" else first(x))


@pytest.mark.parametrize("kind", ["list", "tuple", "attribute"])
def test_modules_are_replaced_where_no_module_dict_holds_them(kind: str) -> None:
    model, x = Aside(kind), torch.randn(2, 4)
    base = frozen_logits(model, x)
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False))
    assert not torch.allclose(logits(model, x), base, atol=1e-3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in lowrank.adapter_parameters(model))
    lowrank.unwrap(model)
    assert torch.equal(frozen_logits(model, x), base)
    kept = model.hidden if kind == "attribute" else model.hidden[0]
    assert (kept[0] if kind == "tuple" else kept) is model.a


def test_training_one_end_of_a_tie_is_refused() -> None:
    with pytest.raises(ValueError, match="train='model.embed_tokens': its weight is tied to lm_head"):
        wrapped("tied_llama", presets.lora(train=("embed_tokens",)))


def test_a_module_that_holds_its_parent(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[1].add_module("above", model)
    modules = dict(model.named_modules())
    lowrank.wrap_model(model, presets.lora(rank=1), progress=False)
    lowrank.add_adapter(model, presets.lora(rank=2), name="second", progress=False)
    assert len(lowrank.adapted_layers(model)) == 2
    model[1][0](model[0](torch.randn(3, 4))).sum().backward()
    with lowrank.adapters_for_rows(model, ["second", None, "default"]):
        model[1][0](model[0](torch.randn(3, 4)))
    lowrank.save_adapter(model, tmp_path, "second")
    lowrank.unwrap(model)
    assert dict(model.named_modules()) == modules
