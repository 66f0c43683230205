"""Products take the precision that is asked for, whatever the program around has set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowrank.products import fast_precision, full_precision, lower_gram, symmetric
from tests.init.matrices import gaussian

CPU = torch.device("cpu")


@pytest.fixture
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("width", [1, 5, 255, 256, 300, 600])
def test_the_gram_matrix(width: int) -> None:
    W, V = (gaussian(30, width, seed=seed, dtype=torch.float64) for seed in (0, 1))
    gram = W.mT @ W
    assert torch.allclose(lower_gram(W).tril(), gram.tril())
    assert torch.allclose(symmetric(lower_gram(W)), gram)
    total = lower_gram(W)
    assert lower_gram(V, total) is total
    assert torch.allclose(symmetric(total), gram + V.mT @ V)


def test_full_precision_is_that_of_the_dtype(medium: None) -> None:
    a, b = gaussian(300, 400), gaussian(400, 300, seed=1)
    with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
        product = a @ b
    assert product.dtype == torch.float32
    assert (product - (a.double() @ b.double())).norm() < 1e-6 * product.norm()


def test_fast_products_have_sums_in_fp32() -> None:
    a, b = gaussian(300, 4000), gaussian(4000, 300, seed=1)
    with torch.autocast("cpu", torch.bfloat16), fast_precision(CPU):
        product = a @ b
    assert product.dtype == torch.float32
    assert (product - (a.double() @ b.double())).norm() < 2**-8 * product.norm()
    halves = a.bfloat16().float(), b.bfloat16().float()
    with fast_precision(CPU):  # bf16 numbers lose nothing
        product = halves[0] @ halves[1]
    assert (product - (halves[0].double() @ halves[1].double())).norm() < 1e-5 * product.norm()


@pytest.mark.parametrize("precision", [full_precision, fast_precision])
def test_it_is_undone_after_an_error(precision: type, medium: None) -> None:
    with pytest.raises(RuntimeError, match="inside"), precision(CPU):
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert torch.get_float32_matmul_precision() == "medium" and torch.is_grad_enabled()
