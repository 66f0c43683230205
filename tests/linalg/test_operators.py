"""Every operator against the matrix that it stands for."""

from __future__ import annotations

import pytest
import torch

from lowrank.linalg.operators import (
    Dense,
    Inverse,
    InverseRoot,
    Product,
    Singular,
    frobenius,
)
from tests.linalg.matrices import gaussian, geometric


def test_products_with_blocks_and_their_transposes() -> None:
    W = gaussian(30, 30, dtype=torch.float64)
    C = gaussian(30, 40, seed=4, dtype=torch.float64)
    tall = gaussian(50, 30, seed=5, dtype=torch.float64)
    root = torch.linalg.cholesky(tall.mT @ tall)
    cases = [
        (Dense(C), C),
        (Product(W, C), W @ C),
        (Inverse(W), W.inverse().mT),
        (InverseRoot(tall), root.inverse()),
    ]
    for operator, matrix in cases:
        assert operator.shape == matrix.shape and operator.like.dtype is torch.float64
        columns, rows = gaussian(matrix.shape[1], 3).double(), gaussian(matrix.shape[0], 3).double()
        assert torch.allclose(operator.forward(columns), matrix @ columns, rtol=1e-8)
        assert torch.allclose(operator.adjoint(rows), matrix.mT @ rows, rtol=1e-8)


def test_inverses_apply_the_inverse_of_the_gram_matrix() -> None:
    W = gaussian(30, 30, dtype=torch.float64)
    columns = gaussian(30, 3, seed=6).double()
    for operator in (Inverse(W), InverseRoot(W)):
        assert torch.allclose(W.mT @ (W @ operator.gram_inverse(columns)), columns, atol=1e-8)


def test_a_singular_matrix_has_no_inverse_but_a_root() -> None:
    W = (gaussian(30, 5) @ gaussian(5, 30, seed=4)).double()
    with pytest.raises(Singular, match="a pivot is zero"):
        Inverse(W.float().double() * 0)
    with pytest.raises(Singular, match="a pivot is zero"):
        Inverse(torch.block_diag(torch.eye(20), torch.zeros(10, 10)).double())
    root = InverseRoot(W)
    eye = torch.eye(30, dtype=torch.float64)
    shift = 4 * torch.finfo(torch.float64).eps * float(W.square().sum())
    assert root.blind == pytest.approx(2 * shift**0.5)
    lower = root.forward(eye).inverse()
    assert torch.allclose(lower @ lower.mT, W.mT @ W + shift * eye, atol=1e-9 * float(W.square().sum()))
    with pytest.raises(Singular, match="not positive"):
        InverseRoot(torch.zeros(30, 30, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
def test_the_norm(dtype: torch.dtype, scale: float) -> None:
    matrix = (geometric(40, 30, 1e3) * scale).to(dtype)
    assert frobenius(matrix) == pytest.approx(float(matrix.double().norm()), rel=1e-6)


def test_the_norm_of_extremes() -> None:
    assert frobenius(torch.zeros(3, 4)) == 0
    assert frobenius(torch.full((2, 2), 1e38)) == pytest.approx(2e38)
    assert frobenius(torch.full((2, 2), 1e-300, dtype=torch.float64)) == pytest.approx(2e-300)
    for bad in (float("nan"), float("inf")):
        assert not frobenius(torch.tensor([[1.0, bad]])) < float("inf")
