"""Adapters of experts are copied into stacks one module after the other, and let go in between."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from torch import nn

import lowrank
from lowrank import presets
from lowrank.layers import weight
from lowrank.layers.adapter import Adapter
from lowrank.layers.expert_stack import ExpertStacks
from tests.layers.test_experts import build


def test_only_the_adapters_of_one_module_are_beside_the_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({name: build("qwen3_moe") for name in "ab"})
    policy = presets.lora(rank=2, target=lambda p: p.param != "weight")
    plan = lowrank.plan_model(model, policy)
    alive: weakref.WeakSet[Adapter] = weakref.WeakSet()
    seen: list[int] = []
    made = Adapter.__init__

    def noted(self: Adapter, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        alive.add(self)

    class Counted(ExpertStacks):
        def __init__(self, *args: Any) -> None:
            seen.append(len(alive))
            super().__init__(*args)

    monkeypatch.setattr(Adapter, "__init__", noted)
    monkeypatch.setattr(weight, "ExpertStacks", Counted)
    lowrank.wrap_model(model, plan, progress=False)
    modules = len({p.module for p in plan})
    assert modules > 1 and seen[0] == len(plan)
    assert seen[-1] <= len(plan) // modules and not alive
