"""Sharded modules that processes do not call alike: an error in all, or what one process computes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank.processes import whole
from lowrank.train import fit
from lowrank.train.callbacks import Callback
from lowrank.train.history import Record
from tests.parallel.processes import refusal, together

OPTIONS: dict[str, Any] = {"lr": 1e-2, "progress": False, "warmup": 0, "allow_unused": True}


class Heads(nn.Module):
    """A trunk and two heads of other widths. A batch's route says which heads are called."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, width) for width in widths)

    def forward(self, x: Tensor, called: tuple[int, ...]) -> list[Tensor]:
        x = self.trunk(x).tanh()
        return [self.heads[head](x) for head in called]


def each_sharded(model: Heads) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.trunk, *model.heads):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches(count: int, **more: Callable[[int], Any]) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(3 + i % 2, 8, generator=draw), **{name: made(i) for name, made in more.items()}}
        for i in range(count)
    ]


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The squares of what the heads give, of those that the batch says; each a mean."""
    given = model(batch["x"], batch.get("called", (0, 1)))
    return sum(
        (given[head].square().mean() for head in batch.get("used", range(len(given)))), torch.zeros(())
    )


def rows(batch: dict[str, Any]) -> float:
    return float(len(batch["x"]))


RIGHT: dict[str, list[dict[str, Any]]] = {  # ranks take them in turn
    "each rank's loss depends on another head": batches(6, used=lambda i: (i % 2,)),
    "one rank has a batch less, and the loss depends on both heads": batches(5),
    "one rank has a batch less, and the loss depends on one head": batches(5, used=lambda i: (1,)),
}


class Sample(Callback):
    """Calls the model in the first process only, as one that shows examples would."""

    def after_step(self, run: Any, record: Record) -> None:
        if dist.get_rank() == 0:
            run.model(torch.ones(1, 8), (0, 1))


def fails_in(rank: int, call: int) -> Callable[[nn.Module, Any], Tensor]:
    calls = [0]

    def fails(model: Heads, batch: dict[str, Any]) -> Tensor:
        calls[0] += 1
        if dist.get_rank() == rank and calls[0] == call:
            model(batch["x"], (0,))
            raise RuntimeError("the loss gave up")
        return loss(model, batch)

    return fails


def scores(model: nn.Module) -> dict[str, float]:
    """Of the first process's share of the data; the second one's is empty."""
    share = batches(2) if dist.get_rank() == 0 else []
    return {f"loss {i}": float(loss(model, batch)) for i, batch in enumerate(share)}


REFUSED: dict[str, dict[str, Any]] = {
    "another head of the same size": {"data": batches(4, called=lambda i: (i % 2,)), "widths": (4, 4)},
    "another head": {"data": batches(4, called=lambda i: (i % 2,))},
    "in another order": {"data": batches(4, called=lambda i: (0, 1) if i % 2 else (1, 0))},
    "a head in one rank": {"data": batches(4, called=lambda i: (0, 1) if i == 2 else (0,))},
    "the loss fails": {"loss": fails_in(1, 2)},
    "the loss fails in an accumulated batch": {"loss": fails_in(1, 2), "accumulate": 2},
    "the weight": {"weight": lambda batch: -1.0 if dist.get_rank() == 1 else 1.0},
    "nothing to evaluate": {"evaluate": scores},
    "a callback": {"callbacks": [Sample()]},
}


def runs(rank: int) -> dict[str, Any]:
    warnings.simplefilter("error")  # FSDP2 warns of outputs that are views
    found: dict[str, Any] = {}
    for name, data in RIGHT.items():
        model = Heads((4, 6))
        history = fit(each_sharded(model), data[rank::2], loss, weight=rows, **OPTIONS)
        found[name] = history.losses, {name: whole(p).clone() for name, p in model.named_parameters()}
    for name, given in REFUSED.items():
        more = {"data": batches(4), "loss": loss, "widths": (4, 6), **given}
        model, mine = each_sharded(Heads(more.pop("widths"))), more.pop("data")[rank::2]
        begins = time.monotonic()
        refused = refusal(lambda model=model, mine=mine, more=more: fit(model, mine, **more, **OPTIONS))
        found[name] = refused, time.monotonic() - begins
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(runs, Path(tmp_path_factory.mktemp("calls")), timeout=100)


@pytest.mark.parametrize("name", RIGHT)
def test_what_a_loss_leaves_out_is_as_in_one_process(name: str, done: list[dict[str, Any]]) -> None:
    model = Heads((4, 6))
    history = fit(model, RIGHT[name], loss, accumulate=2, weight=rows, **OPTIONS)
    for found in done:
        losses, weights = found[name]
        assert losses == pytest.approx(history.losses, rel=1e-5)
        torch.testing.assert_close(weights, dict(model.named_parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("another head of the same size", ("heads.0", "heads.1")),
        ("another head", ("heads.0", "heads.1")),
        ("in another order", ("heads.1", "heads.0")),
        ("a head in one rank", ("heads.1", "none")),
        ("nothing to evaluate", ("the model", "none")),
        ("a callback", ("the model", "none")),
    ],
)
def test_calls_that_differ_are_refused_in_both(
    name: str, calls: tuple[str, str], done: list[dict[str, Any]]
) -> None:
    for found in done:
        (kind, message), seconds = found[name]
        assert kind == "ValueError" and seconds < 30
        assert f"but rank 0 calls {calls[0]}, rank 1 calls {calls[1]}" in message


@pytest.mark.parametrize("name", ["the loss fails", "the loss fails in an accumulated batch"])
def test_what_fails_in_a_forward_fails_in_both(name: str, done: list[dict[str, Any]]) -> None:
    one, two = (found[name][0] for found in done)
    assert one[0] == two[0] == "RuntimeError"
    assert one[1] == "training failed in rank 1: RuntimeError: the loss gave up"
    assert two[1] == "the loss gave up"


def test_a_bad_weight_in_one_process_fails_in_both(done: list[dict[str, Any]]) -> None:
    for found in done:
        (kind, message), _ = found["the weight"]
        assert kind == "ValueError" and "zero or more, got -1.0" in message
