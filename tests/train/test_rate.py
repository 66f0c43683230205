"""A learning rate that is measured: exact on quadratics, and nothing is changed by it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lowrank.train import CheckpointError, History, NonFiniteLoss, fit
from lowrank.train.rate import BATCHES, HIGHEST, SHARE, STEPS, Turns, measured_rate, turning_steps


class Point(nn.Module):
    """Parameters that are called without an input."""

    def __init__(self, **values: list[float]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))


CURVATURE = torch.tensor([1.0, 4.0, 0.5])


def bowl(model: Point, batch: Tensor) -> Tensor:
    """½ Σ cᵢ (xᵢ − bᵢ)²: the gradient is c·(x − b), the Hessian diag(c)."""
    return (CURVATURE * (model.x - batch).square()).sum() / 2


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No highest rate: these losses turn late."""
    monkeypatch.setattr("lowrank.train.rate.HIGHEST", math.inf)


def quiet(*arguments: Any, **options: Any) -> History:
    return fit(*arguments, progress=False, **options)


def test_the_turning_step_of_a_quadratic() -> None:
    """g = (2, −8, 1), so ‖g‖₁ = 11; sᵀHs = 1 + 4 + ½."""
    model = Point(x=[3.0, -1.0, 3.0])
    batches = [torch.tensor([1.0, 1.0, 1.0])]
    assert turning_steps(model, batches, bowl) == pytest.approx((2.0, 2.0), rel=1e-3)
    assert turning_steps(model, batches, bowl, distance=0.25).curved == pytest.approx(2.0, rel=1e-5)


def test_it_is_that_of_the_mean_loss_over_the_first_batches() -> None:
    """The mean of b is (1, 1, 1) over the first two, and the third is not seen."""
    model = Point(x=[3.0, -1.0, 3.0])
    batches = [torch.tensor([0.0, 2.0, 1.0]), torch.tensor([2.0, 0.0, 1.0]), torch.full((3,), 90.0)]
    assert turning_steps(model, batches, bowl, count=2) == pytest.approx((2.0, 2.0), rel=1e-3)


def test_a_loss_that_bends_downward_at_first() -> None:
    """L = 1250 x⁴ − x² from .005 turns at .02. The slope 5000 x³ − 2 x rises over .016, not over .004."""
    slopes = [5000 * x**3 - 2 * x for x in (0.005, 0.009, 0.021)]
    assert slopes[1] < slopes[0] < 0 < slopes[2]
    turns = turning_steps(Point(x=[0.005]), [None], lambda m, batch: (1250 * m.x**4 - m.x**2).sum())
    assert turns.curved == pytest.approx(0.016 * slopes[0] / (slopes[0] - slopes[2]), rel=1e-3)
    assert turns.walked == pytest.approx(0.015, rel=0.02)


def product(model: Point, batch: None) -> Tensor:
    """½(9ab − 1)², as of B and A; from (0, 1) only b has a gradient."""
    return (9 * model.x[0] * model.x[1] - 1).square() / 2


def test_what_has_no_gradient_at_first_moves_once_it_has_one() -> None:
    """Along b alone the loss turns at 1/9; where a grows too, at t(1 + t) = 1/9."""
    turns = turning_steps(Point(x=[0.0, 1.0]), [None], product)
    assert turns.curved == pytest.approx(1 / 9, rel=1e-3)
    assert turns.walked == pytest.approx((math.sqrt(1 + 4 / 9) - 1) / 2, rel=0.02)


def test_what_never_gets_a_gradient_stays() -> None:
    alone = turning_steps(Point(x=[0.0, 1.0]), [None], product)
    beside = Point(x=[0.0, 1.0], y=[5.0])
    assert turning_steps(beside, [None], lambda m, batch: product(m, batch) + 0 * m.y.sum()) == alone


def test_a_loss_that_rises_and_falls_again_has_turned() -> None:
    """It falls, but for a rise by 3 at .01; its slope is negative at .006 and at .018."""

    def loss(model: Point, batch: None) -> Tensor:
        return (5 * model.x.square() - model.x + 3 * ((model.x - 0.01) / 3e-4).sigmoid()).sum()

    assert 0.006 < turning_steps(Point(x=[0.0]), [None], loss).walked < 0.018


def test_half_precision_weights_are_measured_along_the_step_that_they_take() -> None:
    """In bfloat16 a weight of 300 moves by no 0.018, and one of 2⁻⁷ does: g = (300, 2⁻⁷), H = (0, 1)."""
    model = Point(x=[300.0, 2**-7]).bfloat16()
    turns = turning_steps(
        model, [None], lambda m, _: 300 * (m.x[0].float() - 300) + m.x[1].float().square() / 2
    )
    assert turns == pytest.approx((2**-7, 2**-7), rel=0.2)
    with pytest.raises(ValueError, match="does not resolve a step of 0.001; give lr= a number"):
        turning_steps(Point(x=[3.0]).bfloat16(), [None], lambda model, batch: model.x.float().square().sum())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: -model.x.square().sum(), r"not even over 1\.02 \(it bends by -6\)"),
        (lambda model, batch: model.x.sum(), r"not even over 1\.02 \(it bends by 0\)"),
        (
            lambda model, batch: (model.x - model.x.detach()).square().sum(),
            "gradient of what trains is exactly",
        ),
        (lambda model, batch: model.x.sum() * math.nan, "the loss is nan at step 1, in batch 1"),
        (lambda model, batch: (model.x * 0).sqrt().sum(), "the gradient's norm is nan"),
    ],
)
@pytest.mark.parametrize("through", ["turning_steps", "fit"])
def test_where_nothing_can_be_measured(through: str, loss: Any, message: str) -> None:
    model = Point(x=[3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match=f"no learning rate can be measured: .*{message}"):
        if through == "fit":
            quiet(model, [None], loss, lr="auto")
        else:
            turning_steps(model, [None], loss)
    assert model.x.tolist() == [3.0, 2.0, 1.0] and model.x.grad is None


def test_a_loss_that_is_not_finite_keeps_its_class() -> None:
    with pytest.raises(NonFiniteLoss):
        quiet(Point(x=[1.0]), [None], lambda model, batch: model.x.sum() * math.inf, lr="auto")


def test_batches_without_a_label_are_named() -> None:
    batch = {"labels": torch.tensor([-100])}
    with pytest.raises(ValueError, match="the first 2 batches have no label that the loss counts"):
        turning_steps(
            Point(x=[1.0, 2.0]), [batch, batch], lambda m, b: F.cross_entropy(m.x[None], b["labels"])
        )


def noisy(rows: list[Any]) -> tuple[Tensor, ...]:
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return x + 0.1 * random.random() + 0.1 * numpy.random.rand(), y


def problem() -> tuple[nn.Module, DataLoader]:
    """Running statistics, dropout, noise in eval mode too, and every generator draws in the data."""
    torch.manual_seed(1)
    x = torch.randn(32, 4)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)]
    data = TensorDataset(x, x @ torch.randn(4, 2))
    generator = torch.Generator().manual_seed(3)
    return nn.Sequential(*layers), DataLoader(data, 4, True, generator=generator, collate_fn=noisy)


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0] + 0.01 * torch.rand(()) + 0.01 * random.random()), batch[1])


def everything(model: nn.Module, loader: DataLoader) -> list[Any]:
    numbers = [torch.get_rng_state(), loader.generator.get_state(), torch.tensor(random.getstate()[1])]
    numbers.append(torch.tensor(numpy.random.get_state()[1].tolist()))
    tensors = [tensor.clone() for tensor in model.state_dict().values()]
    return [*numbers, *tensors, *(p.grad.clone() for p in model.parameters())]


def test_nothing_is_changed_bit_for_bit() -> None:
    model, loader = problem()
    model[3].eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradients, before = [p.grad for p in model.parameters()], everything(model, loader)
    modes = [module.training for module in model.modules()]
    turning_steps(model, loader, regression)
    assert all(map(torch.equal, everything(model, loader), before))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert modes == [module.training for module in model.modules()]


def test_a_run_with_a_measured_rate_is_the_run_with_that_number() -> None:
    """The same losses: the same batches, dropout and noise."""
    random.seed(5), numpy.random.seed(6)
    model, loader = problem()
    twin, state = copy.deepcopy(model), loader.generator.get_state()
    history = quiet(model, loader, regression, lr="auto")
    rate = history.learning_rate
    assert rate is not None and history[:2].learning_rate == rate
    assert max(record.lr for record in history) == rate

    random.seed(5), numpy.random.seed(6)
    loader.generator.set_state(state)
    again = quiet(twin, loader, regression, lr=rate)
    assert history.losses == again.losses and again.learning_rate == rate
    for one, two in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_the_rate_is_a_share_of_both_lengths_up_to_a_highest() -> None:
    assert measured_rate(Turns(0.006, 0.003)) == pytest.approx(SHARE * 0.002)
    assert measured_rate(Turns(0.002, 1e9)) == pytest.approx(SHARE * 0.002)
    assert measured_rate(Turns(1e9, 0.002)) == pytest.approx(SHARE * 0.002)
    assert measured_rate(Turns(0.004, 0.004), STEPS) == pytest.approx(SHARE * 0.002)
    model = Point(x=[3.0, -1.0, 3.0])
    history = quiet(model, [torch.ones(3)], bowl, lr="auto", warmup=0)
    assert history.learning_rate == HIGHEST == measured_rate(Turns(2.0, 2.0))
    assert [record.lr for record in history] == [history.learning_rate]


def test_a_longer_run_gets_a_lower_rate(unlimited: None) -> None:
    """By the square root of its steps; of a single step the rate is no longer than the length itself."""
    turns = Turns(0.004, 0.004)
    assert measured_rate(turns, 4 * STEPS) == pytest.approx(SHARE * 0.001)
    assert measured_rate(turns, STEPS // 5 * 2) == pytest.approx(SHARE * 0.002 * 2.5**0.5)
    assert measured_rate(turns, 1) == measured_rate(turns, 9) == pytest.approx(0.002)

    def rate(batches: int, **options: Any) -> float:
        history = quiet(Point(x=[3.0, -1.0, 3.0]), [torch.ones(3)] * batches, bowl, lr="auto", **options)
        assert history.learning_rate is not None
        return history.learning_rate

    assert rate(20) == pytest.approx(measured_rate(Turns(2.0, 2.0), 20), rel=1e-3)
    assert rate(20, epochs=4) == pytest.approx(rate(20) / 2)
    assert rate(80, accumulate=4) == pytest.approx(rate(20))
    assert rate(20, steps=80) == pytest.approx(rate(20) / 2)


def test_groups_with_a_rate_of_their_own_keep_it_and_stay(unlimited: None) -> None:
    def loss(model: Point, batch: Tensor) -> Tensor:
        return bowl(model, batch) + 50 * (model.y - model.x.sum()).square().sum()

    model = Point(x=[3.0, -1.0, 3.0], y=[5.0])  # what y adds has no gradient, and bends: 100·(Σs)²
    rates: list[list[float]] = []

    def made(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        rates.append([group["lr"] for group in groups])
        return torch.optim.SGD(groups, lr=0.0)

    groups = ({"params": iter([p]), **own} for p, own in ((model.x, {}), (model.y, {"lr": 0.5})))
    history = quiet(model, [torch.ones(3)], loss, lr="auto", parameters=groups, optimizer=made)
    turn = 11 / (5.5 + 100)  # s = (1, −1, 1)
    expected = measured_rate(Turns(turn, turn), 1)
    assert history.learning_rate == pytest.approx(expected, rel=1e-3)
    assert rates == [[history.learning_rate, 0.5]]
    own = [{"params": [model.x], "lr": 0.1}]
    with pytest.raises(
        ValueError, match='lr="auto" has nothing to measure: every group has an lr of its own'
    ):
        quiet(model, [torch.ones(3)], loss, lr="auto", parameters=own)


def test_groups_with_a_ratio_are_measured_along_the_step_that_they_take(unlimited: None) -> None:
    """g = (2, −8, 1) and (10); the ratios' geometric mean over four numbers is 2, so d moves by ½ and 8."""

    def loss(model: Point, batch: Tensor) -> Tensor:
        return bowl(model, batch) + model.y.square().sum()

    rates: list[list[float]] = []

    def made(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        rates.append([group["lr"] for group in groups])
        return torch.optim.SGD(groups, lr=0.0)

    turn = (11 / 2 + 8 * 10) / (5.5 / 4 + 64 * 2)
    for factor in (1, 3):  # in common to all ratios: it changes no rate
        model = Point(x=[3.0, -1.0, 3.0], y=[5.0])
        groups = [{"params": [model.x], "lr_ratio": factor}, {"params": model.y, "lr_ratio": 16.0 * factor}]
        turns = turning_steps(model, [torch.ones(3)], loss, parameters=groups)
        assert turns == pytest.approx((turn, turn), rel=1e-3)
        history = quiet(model, [torch.ones(3)], loss, lr="auto", parameters=groups, optimizer=made)
        rate = measured_rate(turns, 1) / 2
        assert history.learning_rate == pytest.approx(rate / factor, rel=1e-3)
    assert rates[1] == pytest.approx([rate, 16 * rate], rel=1e-3)
    assert rates[0] == pytest.approx(rates[-1], rel=1e-3)


def test_what_cannot_be_gone_over_again_is_refused() -> None:
    model = Point(x=[3.0, -1.0, 3.0])
    taken: list[Tensor] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(9):
            taken.append(torch.ones(3))
            yield taken[-1]

    with pytest.raises(ValueError, match="batches is an iterator, whose first batches cannot be taken twice"):
        quiet(model, stream(), bowl, lr="auto", steps=3)
    assert not taken
    with pytest.raises(
        ValueError, match="lr: expected a positive number, or 'auto' to measure it, got 'fast'"
    ):
        quiet(model, [torch.ones(3)], bowl, lr="fast")


class Counting:
    """An iterator that can go back."""

    def __init__(self) -> None:
        self.place, self.given = 0, []

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> Tensor:
        self.place += 1
        self.given.append(self.place)
        return torch.full((3,), float(self.place))

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def test_an_iterator_that_can_go_back_is_put_back() -> None:
    batches = Counting()
    quiet(Point(x=[30.0, -1.0, 3.0]), batches, bowl, lr="auto", steps=3)
    assert batches.given == [*range(1, BATCHES + 1), 1, 2, 3]


def plain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def test_a_continued_run_takes_the_rate_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loader = problem()
    options: dict[str, Any] = {"lr": "auto", "epochs": 2, "checkpoint": tmp_path / "run", "every": 4}
    loader.generator.manual_seed(3)
    random.seed(5), numpy.random.seed(6)
    whole = quiet(copy.deepcopy(model), loader, plain, **{**options, "checkpoint": tmp_path / "whole"})

    def gives_up(model: nn.Module, batch: Any) -> Tensor:
        calls.extend([1] * model.training)  # it measures in eval mode
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(model, batch)

    calls: list[int] = []
    loader.generator.manual_seed(3)
    random.seed(5), numpy.random.seed(6)
    with pytest.raises(KeyboardInterrupt) as caught:
        quiet(copy.deepcopy(model), loader, gives_up, **options)
    rate = caught.value.history.learning_rate
    monkeypatch.setattr("lowrank.train.begin.turning", lambda *arguments: pytest.fail("it is measured again"))
    history = quiet(copy.deepcopy(model), loader, plain, **options)
    assert history.learning_rate == rate == whole.learning_rate
    assert len(history) == 16 and history.losses == whole.losses
    with pytest.raises(CheckpointError, match="lr: it was 'auto', it is 'a number'"):
        quiet(copy.deepcopy(model), loader, plain, **{**options, "lr": rate})


def test_batches_count_by_their_labels() -> None:
    """Two labels in one batch and one in the other: as one batch of three."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model.x.expand(len(batch["labels"]), -1), batch["labels"])

    labels = torch.tensor([0, 1, 1])
    model = Point(x=[0.3, -0.1, 0.2])
    apart = turning_steps(model, [{"labels": labels[:2]}, {"labels": labels[2:]}], loss, distance=0.1)
    assert apart == pytest.approx(turning_steps(model, [{"labels": labels}], loss, distance=0.1), rel=1e-4)


def test_float16_is_measured_with_a_scaled_loss(unlimited: None) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), torch.randn(16, 8)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return 1e-6 * model(batch).float().square().mean()

    exact = turning_steps(model, [x], loss, distance=0.05)
    history = quiet(model, [x], loss, lr="auto", autocast=torch.float16)
    assert history.learning_rate == pytest.approx(measured_rate(exact, 1), rel=0.05)
