"""TLoRA: A spans the first right singular vectors of W·C, whatever their basis, and is not trained."""

from __future__ import annotations

import pytest
import torch

from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.init import Factors, TaskAligned
from lowrank.linalg import Product
from lowrank.models.projections import Role
from tests.linalg.matrices import angle, exact, gaussian, generator, orthonormal, power_law


def start(weight: torch.Tensor, covariance: torch.Tensor | None, rank: int = 6) -> Factors:
    measured = ProjectionStatistics(covariance=covariance)
    return TaskAligned()(weight, rank, 2.0, role=Role.UP, statistics=measured, generator=generator())


def covariance(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As of real inputs: a few heavy directions, a long tail."""
    basis, scale = orthonormal(width, width, 8), torch.arange(1, width + 1).double() ** -1.0
    return ((basis * scale) @ basis.mT).to(dtype)


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20), (560, 600)], ids=str)
def test_the_subspace_is_the_reference_one(
    shape: tuple[int, int], formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Product, "cheaper_formed", lambda self, rank: formed)
    W, C = power_law(*shape, 0.5), covariance(shape[1])
    factors = start(W, C)
    product = W.double() @ C.double()
    _, S, Vh = exact(product, 6, "top")
    assert angle(factors.A, Vh) < 1e-3
    overlap = torch.linalg.svdvals(factors.A.double() @ Vh.mT)
    assert torch.allclose(overlap, torch.ones_like(overlap), atol=1e-6)
    if factors.energy is not None:
        assert factors.energy == pytest.approx(float(S.square().sum() / product.square().sum()), rel=1e-4)


def test_rows_are_orthonormal_b_is_zero_and_a_is_frozen() -> None:
    factors = start(gaussian(20, 50), covariance(50))
    assert torch.allclose(factors.A @ factors.A.mT, torch.eye(6), atol=1e-5)
    assert bool((factors.B == 0).all())
    assert factors.frozen == frozenset({"A"}) == TaskAligned().frozen(Role.UP)
    assert TaskAligned().needs == frozenset({"covariance"})


@pytest.mark.parametrize("true_rank", [0, 1, 4])
def test_fewer_directions_than_the_rank_are_filled_up(true_rank: int) -> None:
    """A calibration of few tokens: C, and so W·C, has a lower rank than asked for."""
    inputs = gaussian(true_rank, 50)
    factors = start(gaussian(20, 50), inputs.mT @ inputs)
    assert torch.allclose(factors.A @ factors.A.mT, torch.eye(6), atol=1e-5)
    if true_rank:
        space = torch.linalg.qr(inputs.double().mT).Q.mT
        reached = space @ factors.A.double().mT
        assert torch.allclose(reached.norm(dim=1), torch.ones(true_rank).double(), atol=1e-5)
        assert factors.energy == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_of_either(dtype: torch.dtype) -> None:
    W, C = gaussian(20, 50, dtype=dtype), covariance(50, torch.float64)
    _, _, Vh = exact(W.double() @ C, 6, "top")
    assert angle(start(W, C).A, Vh) < 1e-5
    assert angle(start(W, C.float()).A, Vh) < 1e-3


def test_missing_or_misfitting_statistics_say_what_to_do() -> None:
    W = gaussian(20, 50)
    with pytest.raises(ValueError, match="pass batches="):
        start(W, None)
    with pytest.raises(ValueError, match="pass batches="):
        TaskAligned()(W, 6, 1.0, role=Role.UP, statistics=None, generator=generator())
    with pytest.raises(ValueError, match=r"\(20, 20\) does not fit a weight \(20, 50\): \(50, 50\)"):
        start(W, covariance(20))
    with pytest.raises(ValueError, match="NaN or Inf"):
        start(W, covariance(50) * float("nan"))
