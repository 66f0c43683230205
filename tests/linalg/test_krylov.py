"""The block Krylov method by itself: the angle it reports, exhausted spaces, restarts, and giving up."""

from __future__ import annotations

import pytest
import torch

from lowrank.linalg import krylov
from lowrank.linalg.krylov import Leading, leading
from lowrank.linalg.operators import Dense
from tests.linalg.matrices import angle, exact, gaussian, generator, power_law, with_spectrum


def lead(matrix: torch.Tensor, rank: int = 6, tolerance: float = 5e-4, **options: float) -> Leading | None:
    given = {"blocks": 100, **options}
    return leading(Dense(matrix), rank, generator=generator(), tolerance=tolerance, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("exponent", [0.1, 0.25, 1.0])
def test_the_angle_reported_is_the_angle_reached(exponent: float, tolerance: float) -> None:
    matrix = power_law(200, 240, exponent, torch.float64)
    found = lead(matrix, tolerance=tolerance)
    assert found is not None and found.angle <= tolerance
    assert angle(found.V.mT, exact(matrix, 6, "top")[2]) <= 2 * found.angle
    assert found.following == pytest.approx(float(7**-exponent), rel=1e-1)


def test_fewer_blocks_than_it_takes_give_nothing() -> None:
    matrix = gaussian(300, 300)
    assert lead(matrix, blocks=4) is None
    assert lead(matrix) is not None


@pytest.mark.parametrize("blocks", [3, 4, 20])
def test_a_basis_of_any_width_converges(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow bases are restarted often, wide ones never."""
    monkeypatch.setattr(krylov, "BLOCKS", blocks)
    matrix = power_law(300, 300, 0.25, torch.float64)
    found = lead(matrix, blocks=400)
    assert found is not None
    assert angle(found.V.mT, exact(matrix, 6, "top")[2]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_an_exhausted_space_goes_on_at_random(distinct: int, dtype: torch.dtype) -> None:
    """A Krylov space ends after as many blocks as there are distinct singular values; the basis stays one."""
    values = 1.0 + torch.arange(200).double().mul(distinct).div(200).floor()
    matrix = with_spectrum(values, 200, 220, dtype)
    found = lead(matrix)
    assert found is not None
    assert torch.allclose(found.S, torch.full((6,), float(distinct), dtype=torch.float64), rtol=1e-5)
    small = 1e-5 if dtype is torch.float32 else 1e-12
    for basis in (found.U, found.V):
        assert torch.allclose(basis.mT @ basis, torch.eye(6, dtype=dtype), atol=small)


def test_bases_stay_orthonormal_over_many_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "BLOCKS", 3)
    matrix = gaussian(400, 400)
    found = lead(matrix, tolerance=1e-4, blocks=1000)
    assert found is not None
    for basis in (found.U, found.V):
        assert torch.allclose(basis.mT @ basis, torch.eye(6), atol=2e-5)
    assert float((matrix @ found.V - found.U * found.S.float()).norm()) < 1e-5 * float(matrix.norm())


def test_a_spectrum_too_steep_for_the_dtype_is_left_to_others() -> None:
    values = 10.0 ** -torch.arange(200).double().clamp_max(5.5)
    matrix = with_spectrum(values, 200, 200)
    assert lead(matrix) is None
    assert lead(matrix.double()) is not None


def test_values_that_count_as_ties_are_not_told_apart() -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(20, 10, 40), torch.ones(160)]), 200, 200)
    told, untold = lead(matrix), lead(matrix, infinite=5.0)
    assert told is not None and 0 < told.angle <= 5e-4
    assert angle(told.V.mT, exact(matrix, 6, "top")[2]) < 1e-3
    assert untold is not None and untold.angle == 0
