"""OLoRA against a QR decomposition of the whole weight, and against PEFT's own function."""

from __future__ import annotations

import pytest
import torch

from lowrank.init import Factors, Orthogonal
from lowrank.models.projections import Role
from tests.linalg.matrices import gaussian, generator


def start(weight: torch.Tensor, rank: int = 6, scaling: float = 2.0) -> Factors:
    return Orthogonal()(weight, rank, scaling, role=Role.OTHER, statistics=None, generator=generator())


@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_it_is_the_first_part_of_the_whole_decomposition(shape: tuple[int, int], rank: int) -> None:
    W = gaussian(*shape)
    Q, R = torch.linalg.qr(W.double())
    factors = start(W, rank)
    signs = torch.sign((factors.B.double() * Q[:, :rank]).sum(0))  # each column may point either way
    assert torch.allclose(factors.B.double() * signs, Q[:, :rank], atol=1e-5)
    assert torch.allclose(factors.A.double() * signs[:, None], R[:rank], atol=1e-4)
    assert factors.energy == pytest.approx(float(R[:rank].square().sum() / W.square().sum()), rel=1e-4)


def test_the_first_columns_of_the_weight_are_held_whole() -> None:
    W = gaussian(30, 40)
    factors = start(W, 6)
    assert torch.allclose((factors.B @ factors.A)[:, :6], W[:, :6], atol=1e-5)


@pytest.mark.parametrize("scaling", [0.5, 1.0, 3.0])
def test_the_scaling_does_not_enter(scaling: float) -> None:
    W = gaussian(30, 40)
    assert torch.equal(start(W, scaling=scaling).A, start(W).A)


def test_dependent_first_columns_still_give_orthonormal_ones() -> None:
    W = gaussian(30, 40)
    W[:, 1:4] = W[:, :1]
    factors = start(W, 6)
    assert torch.allclose(factors.B.mT @ factors.B, torch.eye(6), atol=1e-5)
    assert torch.allclose((factors.B @ factors.A)[:, :6], W[:, :6], atol=1e-5)


def test_a_zero_weight_has_energy_zero() -> None:
    factors = start(torch.zeros(30, 40))
    assert factors.energy == 0 and torch.equal(factors.A, torch.zeros(6, 40))
