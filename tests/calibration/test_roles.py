"""Roles found by running the model once, where a module cannot be tried alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank import Policy, find_roles, plan_model, presets

WIDTH, HEADS = 32, 4


class Mixing(nn.Module):
    """Attention that wants a rotation, a mask, and an object with a scale."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.one = nn.Linear(WIDTH, 3 * WIDTH if fused else WIDTH)
        if not fused:
            self.two, self.three = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.four = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, angles: Tensor, *, mask: Tensor, options: Any) -> Tensor:
        if self.fused:
            v, k, q = self.one(x).unflatten(-1, (HEADS, 3, -1)).unbind(-2)
        else:
            v, k, q = (m(x).unflatten(-1, (HEADS, -1)) for m in (self.one, self.two, self.three))
        v, k, q = (t.transpose(1, 2) for t in (v, k, q))
        y = F.scaled_dot_product_attention(q * angles.cos(), k * angles.cos(), v, mask, scale=options.scale)
        return self.four(y.transpose(1, 2).flatten(2))


class Options:
    scale = 0.4


class Model(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Mixing(fused) for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed(ids), ids.shape[1]
        angles = torch.linspace(0, 1, length)[:, None].expand(length, WIDTH // HEADS).to(x.dtype)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        for block in self.blocks:
            x = x + block(x, angles, mask=mask, options=Options())
        return self.norm(x.mT).mT


def batch() -> dict[str, Tensor]:
    return {"ids": torch.arange(10).view(2, 5)}


def test_a_run_of_the_model_tells_what_a_trial_alone_does_not() -> None:
    model = Model()
    assert {p.role.value for p in lowrank.find_projections(model)} == {"other"}
    found = find_roles(model, batch())
    assert found.roles == {
        "blocks.*.one": "value", "blocks.*.two": "key", "blocks.*.three": "query", "blocks.*.four": "output",
    }  # fmt: skip
    assert found.fused == {}
    policy = presets.lora(rank=2, target=("query", "value"), **found._asdict())
    assert Policy.from_json(policy.to_json()) == policy
    assert {p.module.rpartition(".")[2] for p in plan_model(model, policy)} == {"three", "one"}


def test_fused_rows_are_said_as_a_policy_takes_them() -> None:
    model = Model(fused=True)
    found = find_roles(model, batch(), loss=lambda model, batch: model(**batch).sum())
    assert found.fused == {"blocks.*.one": {"groups": HEADS, "value": 8, "key": 8, "query": 8}}
    assert found.roles == {"blocks.*.four": "output"}
    plan = plan_model(model, presets.lora(rank=2, target="query", **found._asdict()))
    assert [p.rows for p in plan] == [(16, 96, 8, 24)] * 3


def test_the_model_stays_as_it_is() -> None:
    model = Model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    find_roles(model, batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_of_one_pattern_that_differ_are_named_apart() -> None:
    model = Model()
    model.blocks[1].one, model.blocks[1].two = model.blocks[1].two, model.blocks[1].one
    model.blocks[1].forward = lambda x, angles, *, mask, options: x  # is never shown
    found = find_roles(model, batch())
    assert found.roles["blocks.*.one"] == "value", "blocks of one class and shape are alike"
    with pytest.raises(ValueError, match="expected a mapping, or loss=.* got Tensor"):
        find_roles(model, torch.zeros(1))
