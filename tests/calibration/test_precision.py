"""Nothing cancels where the mean is large, and nothing small is lost beside something large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Policy
from lowrank.adapters import adapters_of
from lowrank.allocate import ExplainedVariance, Uniform
from lowrank.calibration import calibrate
from lowrank.calibration.accumulators import Rows, Spread
from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.init import ActivationPrincipal, CovarianceOriented
from lowrank.models.projections import Role, find_projections
from lowrank.models.targets import select
from tests import zoo

CPU = torch.device("cpu")


def inputs(ratio: float, examples: int = 12, tokens: int = 40, width: int = 24) -> Tensor:
    """fp32, (examples, tokens, width): each feature's mean is ``ratio`` times its deviation."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, width, dtype=torch.float64)
    drift = 0.2 * torch.randn(examples, 1, width, generator=draw, dtype=torch.float64)
    x = torch.randn(examples, tokens, width, generator=draw, dtype=torch.float64) + drift
    return ((x + ratio) * scales).float()


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("ratio", [0.0, 300.0, 3000.0])
@pytest.mark.parametrize("size", [1, 3, 12])
def test_covariances_of_inputs_with_a_large_mean(ratio: float, size: int) -> None:
    x = inputs(ratio)
    model = nn.Sequential(nn.Linear(24, 8))
    (p,) = find_projections(model)
    got = calibrate(model, [p], ["covariance", "moment"], list(x.split(size)), loss=call, progress=False)[p]
    tokens = x.double().flatten(0, 1)
    centred = tokens - tokens.mean(0)
    assert relative(got.token_covariance, centred.T @ centred / len(tokens)) < 1e-5
    assert relative(got.mean, tokens.mean(0)) < 1e-12
    assert relative(got.moment, tokens.T @ tokens / len(tokens)) < 1e-6
    own = (x.double() - x.double().mean(1, keepdim=True)).flatten(0, 1)
    assert relative(got.covariance, own.T @ own / len(x)) < 1e-5


@pytest.mark.parametrize("ratio", [300.0, 3000.0])
def test_eva_sees_the_variance_beside_a_large_mean(ratio: float) -> None:
    x = inputs(ratio)
    tokens = x.double().flatten(0, 1)
    values, vectors = torch.linalg.eigh((tokens - tokens.mean(0)).T @ (tokens - tokens.mean(0)))
    policy = Policy(target=lambda p: True, rank=4, init=ActivationPrincipal(), allocate=Uniform())
    model = nn.ModuleDict({"body": nn.Linear(24, 8)})
    lowrank.wrap_model(
        model,
        policy,
        batches=list(x.split(3)),
        loss=lambda m, x: m["body"](x).square().mean(),
        progress=False,
    )
    (adapter,) = adapters_of(model).values()
    overlap = torch.linalg.svdvals(adapter.A.detach().double() @ vectors[:, -4:])
    torch.testing.assert_close(overlap, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-4)
    energy = float(values[-4:].square().sum() / values.square().sum())
    assert next(iter(lowrank.plan_of(model).energies.values())) == pytest.approx(energy, rel=1e-3)


@pytest.mark.parametrize("ratio", [300.0, 3000.0])
def test_evas_ranks_follow_the_variance_beside_a_large_mean(ratio: float) -> None:
    """One input varies in one direction, the other in all of them."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.broad = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            line = x.mean(-1, keepdim=True) + torch.linspace(0.5, 1, 24) * (x[..., :1] - ratio)
            return self.narrow(line).square().mean() + self.broad(x).square().mean()

    x = inputs(ratio)
    policy = Policy(rank=4, init=ActivationPrincipal(), allocate=ExplainedVariance(rho=2))
    plans = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = Two().to(dtype)
        batches = list(x.to(dtype).split(3))
        plan = lowrank.plan_model(model, policy, batches=batches, loss=lambda m, x: m(x), progress=False)
        plans.append({p.module: a.rank for p, a in plan.items()})
    assert plans[0] == plans[1] and plans[0]["narrow"] < plans[0]["broad"]


def test_means_may_differ_from_part_to_part() -> None:
    """Pairwise sums do not depend on the order, nor on where the first part lies."""
    x = torch.cat([inputs(0.0)[:1].flatten(0, 1), inputs(3000.0)[:4].flatten(0, 1)])
    wanted = (x.double() - x.double().mean(0)).T @ (x.double() - x.double().mean(0))
    for parts in (x.split(40), x.flip(0).split(40), x.split(1), [x]):
        spread = Spread()
        for part in parts:
            spread.add(Rows(part, half=False, home=CPU))
        assert spread.count == len(x) and relative(spread.mean, x.double().mean(0)) < 1e-12
        assert relative(spread.matrix.tril(), wanted.tril()) < 1e-5


def conditioned(condition: float, size: int = 24) -> Tensor:
    """A square matrix in fp64 with singular values from 1 down to 1 / condition."""
    draw = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q for _ in range(2))
    return (U * torch.logspace(0, -torch.tensor(condition).log10(), size, dtype=torch.float64)) @ V


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 300.0, 3000.0])
def test_corda_at_a_condition_of_8e7(preserve: bool, ratio: float) -> None:
    """Its part of the weight, against an SVD in fp64 of what the initializer is given."""
    weight = conditioned(8e7).float()
    x = inputs(ratio).double().flatten(0, 1)
    mean = x.mean(0)
    covariance = ((x - mean).T @ (x - mean) / len(x)).float()
    measured = ProjectionStatistics(token_covariance=covariance, mean=mean)
    factors = CovarianceOriented(preserve=preserve)(
        weight, 3, 2.0, role=Role.OTHER, statistics=measured, generator=torch.Generator().manual_seed(0)
    )
    C = covariance.double() + torch.outer(mean, mean)
    C += 0.01 * C.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight.double() @ C)
    k = slice(21, 24) if preserve else slice(3)
    part = (U[:, k] * S[k]) @ Vh[k] @ torch.linalg.inv(C)
    assert relative(2.0 * factors.B.double() @ factors.A.double(), part) < 1e-3


@pytest.mark.parametrize("factor", [2.0**-12, 1.0, 2.0**12])
def test_float16_gives_what_fp32_gives(factor: float) -> None:
    """Small gradients would be zero without a scale, and large ones overflow with one that is too large."""
    model, batch = zoo.build("llama"), zoo.batch("llama")
    projections = select(model, "all-linear").projections

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss.float() * factor

    needs = ("covariance", "sensitivity", "gradient")
    wanted = calibrate(model, projections, needs, [batch], loss=loss, progress=False)
    got = calibrate(model.half(), projections, needs, [batch], loss=loss, progress=False)
    for p in projections:
        assert got[p].sensitivity == pytest.approx(wanted[p].sensitivity, rel=0.05), p.name
        for kind in ("gradient", "covariance"):
            here, there = getattr(got[p], kind), getattr(wanted[p], kind)
            assert (here - there).norm() < 0.05 * there.norm(), (p.name, kind)


def test_a_gradient_that_no_scale_brings_into_float16_is_an_error() -> None:
    model = zoo.build("llama").half()
    projections = select(model, "query").projections

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).logits.double().mul(1e20).square().mean()

    with pytest.raises(ValueError, match="a gradient of calibration batch 0 overflows in float16"):
        calibrate(model, projections, ["gradient"], [zoo.batch("llama")], loss=loss, progress=False)
