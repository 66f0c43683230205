"""A learning rate that two processes measure is the one that one process measures with all their batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.processes import part
from lowrank.train import fit
from lowrank.train.rate import turning_steps
from tests.parallel.processes import refusal, sharded, together


class Network(nn.Module):
    """Linear in its parameters, so that a squared error bends upwards everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) + self.layers[1](x.square())


def batches() -> list[tuple[Tensor, Tensor]]:
    """Three, of different sizes."""
    draw = torch.Generator().manual_seed(1)
    sizes = (4, 3, 5)
    return [(torch.randn(n, 6, generator=draw), 5 * torch.randn(n, 2, generator=draw)) for n in sizes]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def copied(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


KINDS = {"DDP": copied, "FSDP2": sharded}


def measured(rank: int, folder: Path) -> dict[str, Any]:
    mine, found = batches()[rank::2], {}  # two and one
    for kind, made in KINDS.items():
        model = made(Network())
        before = [part(p).clone() for p in model.parameters()]
        found[kind, "step"] = turning_steps(model, mine, loss, distance=1e-2)
        same = all(torch.equal(part(p), value) for p, value in zip(model.parameters(), before, strict=True))
        found[kind, "same"] = same and all(p.grad is None for p in model.parameters())
        found[kind, "rate"] = fit(model, mine, loss, lr="auto", progress=False).learning_rate
        bad = [(x, y * float("nan")) for x, y in mine] if rank == 1 else mine
        found[kind, "nan"] = refusal(lambda made=made, bad=bad: turning_steps(made(Network()), bad, loss))
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("rate")
    return together(measured, folder, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_as_one_process_with_all_batches(kind: str, done: list[dict[Any, Any]]) -> None:
    alone = turning_steps(Network(), batches(), loss, distance=1e-2)
    rate = fit(Network(), batches(), loss, lr="auto", progress=False).learning_rate
    one, two = done
    assert one[kind, "step"] == two[kind, "step"] == pytest.approx(alone, rel=1e-3)
    assert one[kind, "rate"] == two[kind, "rate"] == pytest.approx(rate, rel=1e-2)
    assert one[kind, "same"] and two[kind, "same"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_measured_in_one_cannot_in_both(kind: str, done: list[dict[Any, Any]]) -> None:
    for found in done:
        raised, message = found[kind, "nan"]
        assert raised == "NonFiniteLoss" and "no learning rate can be measured" in message
