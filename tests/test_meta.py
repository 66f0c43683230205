"""A wrapped model on the meta device runs forward and backward: shapes and dtypes, no numbers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from tests import zoo

PLAIN = ("lora", "rslora", "lora_fa", "dora", "pissa", "milora", "olora")
# Conv1D with fused rows, interleaved heads, weights that no Linear holds, experts in one tensor.
LAYOUTS = ("gpt2", "neox", "torch_encoder", "mixtral")
MODES = ("plain", "autocast", "no grad", "evaluation")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.q_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.conv = nn.Conv1d(12, 6, 3, padding=1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.conv(self.up_proj(self.q_proj(self.embed(input_ids)).relu()).mT)


def check(model: nn.Module, mode: str) -> None:
    """Runs ``model`` on meta in ``mode``, against the same on the CPU."""
    found = []
    for device in ("cpu", "meta"):
        model = model.to(device).train(mode != "evaluation")
        with ExitStack() as scope:
            if mode == "autocast":
                scope.enter_context(torch.autocast("cpu", torch.bfloat16))
            scope.enter_context(torch.set_grad_enabled(mode in ("plain", "autocast")))
            made: Any = model(input_ids=torch.zeros(2, 5, dtype=torch.long, device=device))
        y: Tensor = getattr(made, "logits", made)
        gradients: dict[str, Any] = {}
        if mode in ("plain", "autocast"):
            y.float().sum().backward()
            gradients = {
                name: None if p.grad is None else (p.grad.shape, p.grad.dtype)
                for name, p in model.named_parameters()
                if p.requires_grad
            }
            assert any(gradients.values())
        assert y.device.type == device
        found.append((y.shape, gradients))
        model.zero_grad()
    assert found[0] == found[1]


@pytest.mark.parametrize("preset", PLAIN)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_plain_preset(preset: str, dropout: float) -> None:
    torch.manual_seed(0)
    model = lowrank.wrap_model(Small(), getattr(presets, preset)(rank=2, dropout=dropout), progress=False)
    for mode in MODES:
        check(model.to_empty(device="cpu"), mode)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("preset", ["lora", "pissa"])
def test_every_layout(family: str, preset: str) -> None:
    # A grouped product of experts has shapes in bf16 only, without adapters too.
    model = zoo.build(family, torch.bfloat16 if family == "mixtral" else torch.float32)
    model = lowrank.wrap_model(model, getattr(presets, preset)(rank=2), progress=False)
    for mode in MODES:
        check(model.to_empty(device="cpu"), mode)


def test_embeddings_convolutions_and_adapters_for_rows() -> None:
    model = lowrank.wrap_model(
        Small(), presets.lora(rank=2, target=("embedding", "conv", "all-linear")), progress=False
    )
    for mode in MODES:
        check(model.to_empty(device="cpu"), mode)
    policy = presets.lora(rank=2, target="q_proj")
    one = lowrank.wrap_model(Small(), policy, name="one", progress=False)
    lowrank.add_adapter(one, policy, name="two", progress=False)
    with lowrank.adapters_for_rows(one.to("meta"), ["one", "two"]):
        y = one(torch.zeros(2, 5, dtype=torch.long, device="meta"))
    y.sum().backward()
    assert y.is_meta and y.shape == (2, 6, 5)


def test_wrapped_on_meta() -> None:
    """The adapters are where the base will be, so that only forward has all that it needs."""
    with torch.device("meta"):
        model = Small()
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    model = lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert {p.device.type for p in lowrank.adapter_parameters(model)} == {"cpu"}
    assert model(ids).is_meta
    model.to("meta")(ids).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in lowrank.adapter_parameters(model))
