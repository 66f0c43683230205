"""A loss or gradient that is not finite and is seen a step late: the weights are those of seeing it at once.

The CPU does here what CUDA does by default; it has no queue, so that nothing is measured of what is saved.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lowrank.train import Callback, History, NonFiniteGradient, NonFiniteLoss, Record, Stopped, fit
from lowrank.train.callbacks import Watched
from lowrank.train.checkpoints import Checkpoints
from lowrank.train.late import Unread


def problem() -> tuple[nn.Sequential, DataLoader]:
    torch.manual_seed(1)
    x = torch.randn(32, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))
    return model, DataLoader(TensorDataset(x, x @ torch.randn(4, 2)), 4, shuffle=True)


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def quiet(model: nn.Module, batches: Any, loss: Any = regression, **options: Any) -> History:
    return fit(model, batches, loss, progress=False, lr=1e-2, **options)


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


class Reads:
    """When each step's numbers were read: (step, losses that were computed by then)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.seen = 0, []
        read = Unread.read

        def watched(unread: Unread) -> Any:
            self.seen.append((unread.step, self.calls))
            return read(unread)

        monkeypatch.setattr(Unread, "read", watched)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        return regression(model, batch)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"weight": lambda batch: 2.0}, {"clip": None}])
def test_a_late_run_is_bit_for_bit_the_usual_one(options: dict[str, Any]) -> None:
    model, loader = problem()
    twin = copy.deepcopy(model)
    late = quiet(model, loader, epochs=2, check="late", **options)
    usual = quiet(twin, loader, epochs=2, check="step", **options)
    assert same(model, twin)
    for one, two in zip(late, usual, strict=True):
        assert (one.step, one.epoch, one.loss, one.lr, one.grad_norm) == (
            two.step,
            two.epoch,
            two.loss,
            two.lr,
            two.grad_norm,
        )
    assert all(record.tokens_per_second > 0 for record in late)
    assert [record.seconds for record in late] == sorted(record.seconds for record in late)


def test_a_step_is_read_while_the_next_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is waited for, since it shows what the loss reaches; the last before the run ends."""
    model, loader = problem()
    reads = Reads(monkeypatch)
    quiet(model, loader, reads.loss, check="late")
    assert reads.seen == [(1, 1), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 8)]


@pytest.mark.parametrize("check", ["late", "step"])
def test_the_time_of_every_step_counts_and_that_of_callbacks_does_not(check: str) -> None:
    model, loader = problem()
    calls: list[int] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        time.sleep(0.3 if len(calls) in (1, 4) else 0)
        return regression(model, batch)

    class Slow(Callback):
        def after_step(self, run: Watched, record: Record) -> None:
            time.sleep(2.0 if record.step == 3 else 0)

    begins = time.perf_counter()
    history = quiet(model, loader, loss, check=check, callbacks=[Slow()])
    assert 0.6 <= history[-1].seconds <= time.perf_counter() - begins - 2.0


def test_on_the_cpu_each_step_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader = problem()
    reads = Reads(monkeypatch)
    quiet(model, loader, reads.loss)
    assert reads.seen == []


def bad_at(step: int, kind: str) -> Any:
    """A loss that is NaN, or has such a gradient, in one step; and the weights that each step began with."""
    weights: list[Tensor] = []

    def loss(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
        weights.append(model[3].weight.detach().clone())
        value = regression(model, batch)
        if len(weights) != step:
            return value
        return value * math.nan if kind == "loss" else value + (model[3].bias * 0).abs().sqrt().sum()

    return loss, weights


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("loss", NonFiniteLoss, "the loss is nan at step 4, in batch 4 of its epoch"),
        ("gradient", NonFiniteGradient, r"the gradient's norm is nan at step 4, though the loss is \["),
    ],
)
def test_nothing_is_updated_from_the_bad_step_on(kind: str, error: type, message: str) -> None:
    """Not by the bad step, nor by the one that was begun before it was seen; the same error and history."""
    model, loader = problem()
    usual, (loss, weights) = copy.deepcopy(model), bad_at(4, kind)
    with pytest.raises(error, match=message) as late:
        quiet(model, loader, loss, check="late")
    assert len(weights) == 5 and torch.equal(weights[4], weights[3])
    with pytest.raises(error, match=message) as at_once:
        quiet(usual, loader, bad_at(4, kind)[0], check="step")
    assert same(model, usual)
    assert late.value.history.losses == at_once.value.history.losses and len(late.value.history) == 3


def test_the_optimizer_is_as_before_the_bad_step(tmp_path: Path) -> None:
    """Its moments and its count of steps, and nothing of the late check stays on it."""
    found: list[dict[str, Any]] = []

    def run(check: str) -> None:
        model, loader = problem()
        made: list[torch.optim.Optimizer] = []

        def factory(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            made.append(torch.optim.AdamW(groups, fused=True))
            return made[0]

        with pytest.raises(NonFiniteLoss):
            quiet(model, loader, bad_at(4, "loss")[0], check=check, optimizer=factory)
        assert not hasattr(made[0], "found_inf") and not hasattr(made[0], "grad_scale")
        found.append(made[0].state_dict()["state"])

    run("late"), run("step")
    for one, two in zip(found[0].values(), found[1].values(), strict=True):
        assert one["step"] == two["step"] == 3
        assert torch.equal(one["exp_avg"], two["exp_avg"])
        assert torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])


@pytest.mark.filterwarnings("ignore:a step's batches have no label")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_label_is_skipped_alone(accumulate: int) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    torch.manual_seed(0)
    batches = [{"x": torch.randn(3, 4), "labels": torch.randint(2, (3,))} for _ in range(12)]
    for bad in (4, 5):
        batches[bad]["labels"] = torch.full((3,), -100)
    model = nn.Linear(4, 2)
    twin = copy.deepcopy(model)
    late = quiet(model, batches, loss, accumulate=accumulate, check="late")
    usual = quiet(twin, batches, loss, accumulate=accumulate, check="step")
    assert [record.skipped for record in late] == [record.skipped for record in usual]
    assert sum(record.skipped == "no labels" for record in late) == 2 // accumulate
    assert same(model, twin) and model.weight.isfinite().all()


class Watching(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def after_step(self, run: Watched, record: Record) -> None:
        self.steps.append((record.step, len(run.history)))


@pytest.mark.parametrize("due", [{"evaluate_every": 3}, {"every": 3}])
def test_what_evaluates_or_saves_sees_the_model_after_its_step(due: dict[str, int], tmp_path: Path) -> None:
    model, loader = problem()
    found: list[list[Any]] = []
    for check in ("late", "step"):
        scores: list[Tensor] = []

        def evaluate(model: nn.Module, scores: list[Tensor] = scores) -> dict[str, float]:
            scores.append(model(torch.ones(4)).sum())
            return {"sum": scores[-1].item()}

        callback, folder = Watching(), tmp_path / check
        history = quiet(
            copy.deepcopy(model),
            loader,
            epochs=1,
            check=check,
            evaluate=evaluate,
            checkpoint=folder,
            keep=9,
            callbacks=[callback],
            **due,
        )
        assert callback.steps == [(step, step) for step in range(1, 9)]
        _, state = next(Checkpoints(folder).load())
        tensors = [*state["trained"]["parameters"].values()]
        found.append([Checkpoints(folder).steps, dict(history.evaluations), tensors])
    late, usual = found
    assert late[:2] == usual[:2] and all(map(torch.equal, late[2], usual[2]))


def test_a_signal_saves_all_steps_that_were_taken(tmp_path: Path) -> None:
    model, loader = problem()
    whole = copy.deepcopy(model)
    calls: list[int] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return regression(model, batch)

    torch.manual_seed(2)
    history = quiet(whole, loader, check="late", checkpoint=tmp_path / "whole")
    with pytest.raises(Stopped) as stopped:
        quiet(copy.deepcopy(model), loader, loss, check="late", checkpoint=tmp_path / "run")
    assert len(stopped.value.history) == 5 and Checkpoints(tmp_path / "run").steps == [5]
    again = quiet(model, loader, check="late", checkpoint=tmp_path / "run")
    assert again.losses == history.losses and same(model, whole)


def test_an_error_elsewhere_leaves_the_steps_that_were_taken_in_the_history(tmp_path: Path) -> None:
    model, loader = problem()

    def data() -> Any:
        yield from list(loader)[:4]
        raise OSError("the disk gave up")

    log = tmp_path / "run.jsonl"
    with pytest.raises(OSError, match="the disk gave up") as caught:
        quiet(model, data(), steps=9, check="late", log=log)
    assert [record.step for record in caught.value.history] == [1, 2, 3, 4]
    assert History.load(log) == caught.value.history


def plain_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=False, foreach=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "never"}, "check: expected 'step', 'late' or None, got 'never'"),
        ({"check": "late", "autocast": torch.float16}, "the scale of a float16 loss depends on each step"),
        (
            {"check": "late", "optimizer": plain_adamw},
            "AdamW cannot skip a step on the device: make it",
        ),
    ],
)
def test_where_it_cannot_be_late(options: dict[str, Any], message: str) -> None:
    model, loader = problem()
    with pytest.raises(ValueError, match=message):
        quiet(model, loader, **options)


@pytest.mark.gpu
def test_a_late_run_waits_in_no_step_on_a_gpu() -> None:
    model, loader = problem()
    model.cuda()
    batches = [(x.pin_memory(), y.pin_memory()) for x, y in loader] * 4
    quiet(model, batches[:2])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not started:
            started.append(1)
        elif len(started) == 1:  # from the second step on: the first is waited for
            started.append(1)
            torch.cuda.set_sync_debug_mode("error")
        return regression(model, batch)

    started: list[int] = []
    try:
        history = quiet(model, batches, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(history) == 32
