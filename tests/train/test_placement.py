"""A batch that cannot be moved to the model's device: named, and the last checkpoint stays good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.train import History, fit
from lowrank.train.checkpoints import Checkpoints
from lowrank.train.placement import MisplacedBatch


@dataclass
class Pair:
    """What `to_device` passes on as it is."""

    x: Tensor
    y: Tensor


class Slotted:
    __slots__ = ("held",)

    def __init__(self, *held: Tensor) -> None:
        self.held = {"both": held}


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch.x, batch.y) if isinstance(batch, Pair) else batch.held["both"]
    return F.mse_loss(model(x), y)


def quiet(model: nn.Module, batches: Any, loss: Any = loss, **options: Any) -> History:
    return fit(model, batches, loss, progress=False, **options)


def pair(device: str = "cpu") -> Pair:
    return Pair(torch.randn(3, 4).to(device), torch.randn(3, 2))


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (Pair(torch.ones(3, 4, device="meta"), torch.ones(3, 2)), r"Pair\.x"),
        (Slotted(torch.ones(3, 4), torch.ones(3, 2, device="meta")), r"Slotted\.held\['both'\]\[1\]"),
    ],
)
def test_batch_and_devices_are_named_and_the_last_checkpoint_is_good(
    bad: Any, name: str, tmp_path: Path
) -> None:
    model = nn.Linear(4, 2)
    batches = [pair() for _ in range(6)]
    options: dict[str, Any] = {"checkpoint": tmp_path, "every": 1}
    with pytest.raises(
        MisplacedBatch,
        match=rf"batch 4 of its epoch: {name} is on meta and the model is on cpu: give ",
    ) as caught:
        quiet(model, [*batches[:3], bad, *batches[4:]], **options)
    assert isinstance(caught.value, ValueError) and len(caught.value.history) == 3
    assert isinstance(caught.value.__cause__, RuntimeError)
    step, state = next(Checkpoints(tmp_path).load())
    assert step == 3
    for saved, now in zip(state["trained"]["parameters"].values(), model.parameters(), strict=True):
        assert torch.equal(saved, now)
    history = quiet(nn.Linear(4, 2), batches, **options)
    assert [record.step for record in history] == list(range(1, 7))
    assert history.losses[:3] == caught.value.history.losses


def test_a_loss_may_move_them_itself() -> None:
    def moves(model: nn.Module, batch: Pair) -> Tensor:
        return loss(model, Pair(torch.zeros_like(batch.x, device="cpu"), batch.y))

    assert len(quiet(nn.Linear(4, 2), [pair("meta")], moves)) == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_error_is_left_as_it_is(device: str) -> None:
    def fails(model: nn.Module, batch: Pair) -> Tensor:
        raise RuntimeError("the loss gave up")

    with pytest.raises(RuntimeError, match="^the loss gave up$"):
        quiet(nn.Linear(4, 2), [pair(device)], fails)
