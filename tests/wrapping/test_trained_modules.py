"""Modules trained in full beside the adapters: copies, so that the originals stay."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import frozen_logits, logits


def test_a_trained_sequential_can_be_indexed_and_walked() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.head[0](self.body(x))
            for layer in list(self.head)[1 : len(self.head)]:
                x = layer(x)
            return x if self.head and self.body else -x

    model, x = Model(), torch.randn(3, 4)
    before = frozen_logits(model, x)
    lowrank.wrap_model(model, presets.lora(rank=2, target="body", train=("head",)))
    assert torch.equal(logits(model, x), before)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.head.copy.parameters())


def test_a_trained_head_leaves_the_original_alone() -> None:
    model, batch = zoo.build("bert"), zoo.batch("bert")
    head, base = model.classifier, frozen_logits(model, batch)
    start = head.weight.clone()
    lowrank.wrap_model(model, presets.lora(rank=2, train=("classifier",)), progress=False)
    assert torch.equal(logits(model, batch), base)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert model.classifier.out_features == 2, "what the head has is still seen"
    assert not torch.equal(logits(model, batch), base)
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, batch), base)
    trained = logits(model, batch)
    merged = lowrank.merge(copy.deepcopy(model))
    assert torch.equal(logits(merged, batch), trained)
    lowrank.unwrap(model)
    assert model.classifier is head and torch.equal(head.weight, start)
