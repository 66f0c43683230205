"""Wrapped models as they are found: disabled, inside a larger module, beside another one, or not wrapped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from tests import zoo
from tests.helpers import logits, perturb, wrapped


def test_disabling_nests_and_survives_an_error() -> None:
    model, batch = perturb(wrapped()), zoo.batch("llama")
    on = logits(model, batch)
    with pytest.raises(KeyError), lowrank.disable_adapters(model):
        with lowrank.disable_adapters(model):
            off = logits(model, batch)
        assert torch.equal(logits(model, batch), off)
        raise KeyError
    assert torch.equal(logits(model, batch), on) and not torch.equal(on, off)


def test_a_wrapped_part_is_found_inside_a_larger_module() -> None:
    class Trainer(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    outer = Trainer(perturb(wrapped()))
    assert len(lowrank.adapted_layers(outer)) == 14
    assert lowrank.unwrap(outer) is outer
    assert not lowrank.adapted_layers(outer)


def test_parts_that_were_wrapped_apart_are_named_apart() -> None:
    pair = nn.ModuleDict({"a": wrapped("perceptron"), "b": wrapped("perceptron")})
    for act in (lowrank.unwrap, lowrank.merge, lowrank.plan_of):
        with pytest.raises(ValueError, match="wrapped apart, so name one of them: a, b"):
            act(pair)
    lowrank.unwrap(pair["a"])
    assert lowrank.plan_of(pair) is lowrank.plan_of(pair["b"])


def test_what_is_not_wrapped_cannot_be_taken_out() -> None:
    for act in (
        lowrank.unwrap,
        lowrank.merge,
        lowrank.plan_of,
        lambda m: lowrank.disable_adapters(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="not wrapped"):
            act(zoo.build("llama"))
