"""`fit` in float16 gives fp32's gradient, and its seeds repeat a script and never a run that goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lowrank
from lowrank import presets
from lowrank.train import History, NonFiniteGradient, fit

TINY = 1e-5  # a factor of the loss that brings its gradient below float16's smallest number


def quiet(*arguments: Any, **options: Any) -> History:
    return fit(*arguments, progress=False, **options)


def scaled_by(factor: float) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return factor * model(batch).float().square().mean()

    return loss


def data() -> list[Tensor]:
    return list(torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(3)))


def on_half_base() -> nn.Module:
    """An adapter on a float16 base; the base after it passes the gradient on in float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64)).half()
    return lowrank.wrap_model(model, presets.lora(rank=2, target=("0",)), progress=False)


def under_autocast() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64).requires_grad_(False))


def moved(model: nn.Module, before: nn.Module) -> Tensor:
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    return torch.cat(
        [(new.detach() - old.detach()).float().flatten() for new, old in pairs if new.requires_grad]
    )


CASES = [(on_half_base, None, torch.float16), (under_autocast, torch.float16, torch.float32)]


@pytest.mark.parametrize(("make", "autocast", "dtype"), CASES)
def test_a_tiny_loss_in_float16_trains_as_in_float32(
    make: Callable[[], nn.Module], autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    batches = [batch.to(dtype) for batch in data()]
    half = make()
    full, before = copy.deepcopy(half).float(), copy.deepcopy(half)
    options = {"lr": 1e-3, "accumulate": 2, "schedule": "constant"}
    found = quiet(half, batches, scaled_by(TINY), autocast=autocast, **options)
    wanted = quiet(full, [batch.float() for batch in batches], scaled_by(TINY), **options)
    assert [record.skipped for record in found] == ["", ""]
    assert wanted[0].grad_norm > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.02)
    step = moved(full, before)
    assert (moved(half, before) - step).norm() < 0.05 * step.norm()


def test_without_scaling_that_loss_has_a_gradient_of_zero() -> None:
    """What the test above is worth: in float16 nothing is left of the gradient."""
    model = on_half_base()
    scaled_by(TINY)(model, data()[0].half()).backward()
    assert all(not parameter.grad.any() for parameter in lowrank.adapter_parameters(model))


def test_a_step_that_overflows_is_skipped_and_recorded(tmp_path: Any) -> None:
    """The first scale is 65,536, which overflows here; after some halving it does not."""
    model, states = on_half_base(), []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        states.append([p.detach().clone() for p in lowrank.adapter_parameters(model)])
        return scaled_by(2000.0)(model, batch)

    batches = [batch.half() for batch in data()]
    history = quiet(model, batches, loss, epochs=10, log=tmp_path / "log.jsonl")
    skipped = [record.skipped == "overflow" for record in history]
    last = skipped.index(False)
    assert 0 < last < 12 and not any(skipped[last:])
    assert all(map(torch.equal, states[0], states[last])), "a skipped step moved the parameters"
    assert not all(map(torch.equal, states[last], states[last + 1]))
    assert History.load(tmp_path / "log.jsonl") == history


def test_a_gradient_that_no_scale_makes_finite_is_an_error() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (0 * model(batch).float()).abs().sqrt().sum()

    with pytest.raises(NonFiniteGradient, match="norm is nan at step 17") as caught:
        quiet(on_half_base(), [batch.half() for batch in data()], loss, epochs=10)
    assert {record.skipped for record in caught.value.history} == {"overflow"}


def test_parameters_in_float16_are_refused() -> None:
    model = nn.Linear(8, 2).half()
    with pytest.raises(ValueError, match=r"2 of the parameters to train are torch\.float16"):
        quiet(model, [batch.half() for batch in data()], scaled_by(1.0))


@pytest.mark.gpu
@pytest.mark.parametrize(("make", "autocast", "dtype"), CASES)
def test_float16_on_a_gpu(
    make: Callable[[], nn.Module], autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    batches = [batch.to(dtype).cuda() for batch in data()]
    half = make().cuda()
    full = copy.deepcopy(half).float()
    found = quiet(half, batches, scaled_by(TINY), autocast=autocast)
    wanted = quiet(full, [batch.float() for batch in batches], scaled_by(TINY))
    assert found[0].grad_norm == pytest.approx(wanted[0].grad_norm, rel=0.02)


def test_the_norm_of_a_bf16_gradient_is_taken_in_fp32() -> None:
    model = nn.Linear(1, 1003, bias=False).bfloat16()
    history = quiet(model, [torch.ones(1, 1).bfloat16()], lambda model, batch: model(batch).float().sum())
    assert history[0].grad_norm == pytest.approx(1003**0.5, rel=1e-6)


# -- seeds ------------------------------------------------------------------------------------------------


def script() -> tuple[list[list[int]], list[float], list[Tensor]]:
    """Trains twice with shuffled examples and dropout: the orders, the losses and what was learnt."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 2))
    x, orders = torch.randn(12, 8), []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        orders[-1] += batch.tolist()
        return F.mse_loss(model(x[batch]), torch.ones(len(batch), 2))

    loader, losses = DataLoader(torch.arange(12), 4, shuffle=True), []
    for _ in range(3):
        orders.append([])
        losses += quiet(model, loader, loss).losses
    return orders, losses, [parameter.detach() for parameter in model.parameters()]


def test_a_second_run_goes_on_with_other_numbers() -> None:
    orders, _, _ = script()
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] and orders[1] != orders[2] and orders[0] != orders[2]


def test_a_second_run_draws_other_dropout() -> None:
    model, masks = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)), []
    model[0].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    for _ in range(2):
        quiet(model, [torch.ones(1, 64)], scaled_by(1.0))
    assert not torch.equal(*masks)


def test_the_same_script_gives_the_same_bits() -> None:
    one, other = script(), script()
    assert one[:2] == other[:2] and all(map(torch.equal, one[2], other[2]))


def test_new_adapters_on_the_same_base_start_anew() -> None:
    torch.manual_seed(0)
    base, runs = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)), []
    for _ in range(2):
        lowrank.wrap_model(base, presets.lora(rank=2), progress=False)
        runs.append(quiet(base, DataLoader(torch.stack(data())[0], 4, shuffle=True), scaled_by(1.0)).losses)
        lowrank.unwrap(base)
    assert runs[0] == runs[1]


# -- what the loss does not reach ---------------------------------------------------------------------------


class Partly(nn.Module):
    """One layer is called, one is not, and one is called for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.vain = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.call_idle = self.call_attention = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.used(x) + 0 * self.vain(x)
        if self.call_attention:
            y = y + self.attention(x, x, x)[0]
        return y + self.idle(x) if self.call_idle else y


def test_layers_that_are_not_called_are_named_by_their_paths() -> None:
    targets = ("used", "idle", "attention", "attention.out_proj")
    model = lowrank.wrap_model(Partly(), presets.lora(rank=2, target=targets), progress=False)
    with (
        pytest.warns(UserWarning, match="no forward has used"),
        pytest.raises(ValueError, match=r"no gradient to 3 of what is to train: (.+); freeze it") as caught,
    ):
        quiet(model, data(), scaled_by(1.0))
    named = str(caught.value).partition("train: ")[2].partition(";")[0].split(", ")
    assert sorted(named) == ["attention", "attention.out_proj", "idle"]


def test_a_layer_of_which_a_part_is_not_used_is_named_with_that_part() -> None:
    model = lowrank.wrap_model(Partly(), presets.lora(rank=2, target=("used",)), progress=False)
    model.used.adapters["default"][0].A.requires_grad_(False)
    model.used.adapters["default"][0].register_parameter("extra", nn.Parameter(torch.ones(1)))
    with pytest.raises(
        ValueError, match=r"no gradient to 1 .*: used \(adapters\.default\.0\.extra\); freeze"
    ):
        quiet(model, data(), scaled_by(1.0))


def test_a_layer_that_is_called_for_nothing_is_told_apart() -> None:
    model = lowrank.wrap_model(Partly(), presets.lora(rank=2, target=("used", "vain")), progress=False)
    with pytest.warns(UserWarning, match="first gradient is exactly zero in 1 layers: vain; they are called"):
        quiet(model, data(), scaled_by(1.0))
    quiet(model, data(), scaled_by(1.0), allow_unused=True)


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_the_norm_is_zero_where_a_later_step_reaches_nothing(autocast: torch.dtype | None) -> None:
    """The first batch trains the layer; another reaches only what is not in ``parameters``."""
    model = Partly()

    def loss(model: Any, batch: Tensor) -> Tensor:
        return (model.used if batch.sum() > 0 else model.idle)(batch).square().mean()

    batches = [torch.ones(1, 8), -torch.ones(1, 8)]
    history = quiet(model, batches, loss, parameters=model.used.parameters(), autocast=autocast)
    assert history[0].grad_norm > 0 and history[1].grad_norm == 0.0
