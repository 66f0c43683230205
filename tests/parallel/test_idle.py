"""Experts that a batch does not use, in some processes or in all: no process waits for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.processes import whole
from lowrank.train import fit
from tests.parallel.processes import refusal, sharded, together
from tests.parallel.test_fit import with_copies

KINDS = {"DDP": with_copies, "FSDP2": sharded}
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "progress": False, "warmup": 0, "clip": 0.1}
ROUTES = {  # of each batch: ranks alternate
    "another in each rank": [0, 1, 1, 0, 0, 1],
    "one in one rank, later": [0, 0, 0, 1, 0, 0],
    "never the second": [0, 0, 0, 0, 0, 0],
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor, route: int) -> Tensor:
        return self.frozen(x) + self.experts[route](x).tanh()


class Routed(nn.Module):
    """Two blocks; the batch says which expert is used in both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))

    def forward(self, x: Tensor, route: int) -> Tensor:
        for layer in self.layers:
            x = layer(x, route)
        return self.head[route](x)


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"], batch["route"]), batch["labels"])


def batches(routes: list[int]) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(3 + i % 2, 8, generator=draw),
            "labels": torch.randint(4, (3 + i % 2,), generator=draw),
            "route": route,
        }
        for i, route in enumerate(routes)
    ]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def runs(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for kind, made in KINDS.items():
        for name, routes in ROUTES.items():
            model = Routed()
            history = fit(made(model), batches(routes)[rank::2], loss, allow_unused=True, **OPTIONS)
            found[kind, name] = history.losses, trained(model)
        model = made(Routed())
        found[kind, "refused"] = refusal(
            lambda model=model: fit(model, batches([0] * 6)[rank::2], loss, **OPTIONS)
        )
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return together(runs, Path(tmp_path_factory.mktemp("idle")), timeout=60)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_idle_experts_are_as_in_one_process(kind: str, name: str, done: list[dict[Any, Any]]) -> None:
    """Also that what no process used is not decayed, as it has no gradient."""
    model = Routed()
    history = fit(model, batches(ROUTES[name]), loss, accumulate=2, allow_unused=True, **OPTIONS)
    for found in done:
        losses, weights = found[kind, name]
        assert losses == pytest.approx(history.losses, rel=1e-5)
        torch.testing.assert_close(weights, trained(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_process_uses_is_named(kind: str, done: list[dict[Any, Any]]) -> None:
    for found in done:
        name, message = found[kind, "refused"]
        assert name == "ValueError" and "gives no gradient to 6 of what is to train" in message
        assert "layers.0.experts.1.weight" in message and "head.1.bias" in message
