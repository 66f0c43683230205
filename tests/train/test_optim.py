"""Learning rates, exactly; the optimizer's groups; options that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.train.optim import SCHEDULES, Schedule, adamw


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
@pytest.mark.parametrize("warmup", [2, 1 / 3])
def test_schedule(kind: str, expected: list[float], warmup: int | float) -> None:
    schedule = Schedule(kind, steps=6, warmup=warmup)
    assert [schedule(step) for step in range(6)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 0.0, 0.03, 0.5, 1.0])
def test_no_step_is_wasted(kind: str, steps: int, warmup: int | float) -> None:
    schedule = Schedule(kind, steps, warmup)
    factors = [schedule(step) for step in range(steps)]
    peak = min(schedule.warmup_steps, steps - 1)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:peak] == sorted(factors[:peak]) and factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) == 1


@pytest.mark.parametrize("warmup", [-1, 7, 1.5, -0.1, math.nan, True, "3%"])
def test_a_bad_warmup_is_refused(warmup: Any) -> None:
    with pytest.raises(ValueError, match="warmup"):
        Schedule("cosine", 6, warmup)


def test_a_bad_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of 'cosine', 'linear', 'constant', got 'cosin'"):
        Schedule("cosin", 6)


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


def test_adamw_takes_what_requires_grad() -> None:
    net = model()
    optimizer = adamw(net, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    (group,) = optimizer.param_groups
    assert group["params"] == [net[1].weight, net[1].bias]
    assert (group["lr"], group["weight_decay"], group["betas"], group["fused"]) == (
        0.1,
        0.2,
        (0.8, 0.9),
        True,
    )


def test_adamw_does_without_a_fused_kernel() -> None:
    assert not adamw(nn.Linear(2, 2, device="meta"), lr=0.1).param_groups[0]["fused"]


def test_adamw_takes_groups_and_leaves_them_alone() -> None:
    net = model()
    given = [{"params": net[1].weight, "lr": 1.0}, {"params": iter([net[1].bias])}, {"params": []}]
    first, second = adamw(net, given, lr=0.1).param_groups
    assert (first["lr"], second["lr"]) == (1.0, 0.1)
    assert first["params"] == [net[1].weight] and second["params"] == [net[1].bias]
    assert given[0].keys() == {"params", "lr"}


def test_adamw_fused_steps_as_the_plain_one_does() -> None:
    net = model()
    twin = [nn.Parameter(parameter.detach().clone()) for parameter in net[1].parameters()]
    fused, plain = adamw(net, lr=0.1, weight_decay=0.1), torch.optim.AdamW(twin, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for one, other in zip(net[1].parameters(), twin, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        fused.step()
        plain.step()
    for one, other in zip(net[1].parameters(), twin, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"lr": math.nan}, "lr: expected a positive number"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay: expected zero or more"),
        ({"lr": 0.1, "betas": (0.9, 1.0)}, "betas: expected two numbers"),
        ({"lr": 0.1, "betas": (0.9,)}, "betas: expected two numbers"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw(model(), **options)


def test_bad_parameters_are_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match="nothing requires grad"):
        adamw(net.requires_grad_(False), lr=0.1)
    with pytest.raises(
        ValueError, match=r"2 of the parameters to train do not require grad.*\(4, 3\), \(4,\)"
    ):
        adamw(net, net[0].parameters(), lr=0.1)
    net = model()
    with pytest.raises(ValueError, match="not both, got"):
        adamw(net, [net[1].weight, {"params": net[1].bias}], lr=0.1)
    with pytest.raises(ValueError, match="named twice"):
        adamw(net, [net[1].weight, net[1].weight], lr=0.1)
    with pytest.raises(ValueError, match=r"lr: expected a positive number, got -1\.0"):
        adamw(net, [{"params": net[1].weight, "lr": -1.0}], lr=0.1)
