"""Two processes that wrap their copies of a base get the same adapters, also where they round otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lowrank
from lowrank import presets
from tests import zoo
from tests.parallel.processes import refusal, together


def made(rank: int) -> dict[str, Any]:
    base = zoo.build("llama")
    if rank:
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(1 + 1e-6)
    found: dict[str, Any] = {}
    model = lowrank.wrap_model(base, presets.pissa(rank=2, dora=True), progress=False)
    adapters = lowrank.adapters.adapters_of(model)
    found["adapters"] = {
        f"{p.name}.{key}": tensor.detach().clone()
        for p, adapter in adapters.items()
        for key, tensor in (*adapter.named_parameters(), *adapter.named_buffers())
    }
    policy = presets.lora(rank=2, dora=rank == 1)
    found["plans"] = refusal(lambda: lowrank.wrap_model(zoo.build("llama"), policy, progress=False))
    return found


def test_all_get_the_values_of_the_first(tmp_path: Path) -> None:
    one, two = together(made, tmp_path)
    assert one["adapters"].keys() == two["adapters"].keys()
    assert any(key.endswith("magnitude.squares") for key in one["adapters"])
    for key, tensor in one["adapters"].items():
        assert torch.equal(tensor, two["adapters"][key]), key
    for kind, message in (one["plans"], two["plans"]):
        assert kind == "ValueError"
        assert "for dora, rank 0 has False and rank 1 has True" in message
