"""Singular triplets against an fp64 SVD, at spectra that are easy, slow, steep and degenerate."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lowrank.linalg import Product, Triplets, bottom_singular, singular, top_singular
from tests.linalg.matrices import (
    angle,
    distance,
    exact,
    gaussian,
    generator,
    geometric,
    orthonormal,
    part,
    power_law,
    with_spectrum,
)

SHAPES = [(48, 48), (40, 96), (96, 40), (600, 600), (540, 700), (700, 540)]
SPECTRA: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": gaussian,
    "k^-0.25": lambda out, into: power_law(out, into, 0.25),
    "k^-1": lambda out, into: power_law(out, into, 1.0),
    "condition 1e3": lambda out, into: geometric(out, into, 1e3),
    "condition 1e5": lambda out, into: geometric(out, into, 1e5),
}
FIND = {"top": top_singular, "bottom": bottom_singular}


def find(end: str, matrix: Tensor | Product, rank: int, seed: int = 0, **options: float) -> Triplets:
    return FIND[end](matrix, rank, generator=generator(seed), **options)  # type: ignore[operator]


def assert_sound(found: Triplets, matrix: Tensor, rank: int) -> None:
    """What holds of any triplets: shapes, orthonormal factors, order, M·V = U·S, and fair figures."""
    out, into = matrix.shape
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((out, rank), (rank,), (rank, into))
    one = torch.eye(rank, dtype=torch.float64)
    U, S, Vh = found.U.double(), found.S.double(), found.Vh.double()
    tolerance = 2e-5 if found.U.dtype is torch.float32 else 1e-12
    assert torch.allclose(U.mT @ U, one, atol=tolerance) and torch.allclose(Vh @ Vh.mT, one, atol=tolerance)
    assert bool((S[:-1] >= S[1:]).all()) and bool((S >= 0).all())
    scale = float(matrix.double().norm())
    assert float((matrix.double() @ Vh.mT - U * S).norm()) <= tolerance * scale
    assert (
        float((matrix.double().mT @ U - Vh.mT * S).norm())
        <= (found.residual * sqrt(rank) + tolerance) * scale
    )
    assert 0 <= found.angle <= 1
    if scale:
        assert found.energy == pytest.approx(float(S.square().sum()) / scale**2, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_part_is_the_exact_one(spectrum: str, shape: tuple[int, int], end: str) -> None:
    """s·B·A must be the exact part within 1e-3; the energy within 1e-4; the angle no larger than reported."""
    matrix, rank = SPECTRA[spectrum](*shape), 8
    found = find(end, matrix, rank)
    assert_sound(found, matrix, rank)
    U, S, Vh = exact(matrix, rank, end)
    assert distance(part(found.U, found.S, found.Vh), part(U, S, Vh)) < 1e-3
    assert float(found.S.double().square().sum()) == pytest.approx(float(S.square().sum()), rel=1e-4)
    assert found.angle <= 1e-3
    assert angle(found.Vh, Vh) <= 3 * found.angle + 1e-5


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("rank", [1, 30, 31, 32])
@pytest.mark.parametrize("shape", [(32, 32), (32, 50), (50, 32)], ids=str)
def test_any_rank_up_to_the_whole(shape: tuple[int, int], rank: int, end: str) -> None:
    matrix = gaussian(*shape)
    found = find(end, matrix, rank)
    assert_sound(found, matrix, rank)
    assert distance(part(found.U, found.S, found.Vh), part(*exact(matrix, rank, end))) < 1e-4
    if rank == 32:
        assert found.energy == pytest.approx(1, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    end=st.sampled_from(["top", "bottom"]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
    data=st.data(),
)
def test_any_matrix_gives_sound_triplets(
    out: int, into: int, end: str, scale: float, data: st.DataObject
) -> None:
    true_rank = data.draw(st.integers(0, min(out, into)), label="true rank")
    rank = data.draw(st.integers(1, min(out, into)), label="rank")
    matrix = scale * gaussian(out, true_rank) @ gaussian(true_rank, into, seed=4)
    found = find(end, matrix, rank)
    assert_sound(found, matrix, rank)
    _, S, _ = exact(matrix, rank, end)
    largest = float(matrix.double().norm())
    assert torch.allclose(found.S.double(), S, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("width", [64, 520])
def test_half_precision_is_read_as_fp32_and_fp64_is_kept(dtype: torch.dtype, end: str, width: int) -> None:
    matrix = gaussian(width, width, dtype=dtype)
    found = find(end, matrix, 4)
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    assert {found.U.dtype, found.S.dtype, found.Vh.dtype} == {kept}
    assert distance(part(found.U, found.S, found.Vh), part(*exact(matrix, 4, end))) < 1e-3


@pytest.mark.parametrize("width", [96, 600])
@pytest.mark.parametrize("decades", [2, 4])
def test_the_light_directions_of_a_steep_spectrum_are_right_too(width: int, decades: int) -> None:
    """The part weighs them by nothing, but TLoRA trains them all alike."""
    rank = 8
    values = 10.0 ** -(decades * torch.arange(width).double() / rank).clamp_max(12)
    matrix = with_spectrum(values, width, width)
    found = top_singular(matrix, rank, generator=generator())
    assert angle(found.Vh, exact(matrix, rank, "top")[2]) < 1e-3


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("shape", [(64, 64), (64, 90), (576, 576), (576, 700), (700, 576)], ids=str)
@pytest.mark.parametrize("true_rank", [0, 3, 40])
def test_low_rank_and_zero_matrices(true_rank: int, shape: tuple[int, int], end: str) -> None:
    matrix = gaussian(shape[0], true_rank) @ gaussian(true_rank, shape[1], seed=4)
    found = find(end, matrix, 8)
    assert_sound(found, matrix, 8)
    assert found.residual < 1e-6  # also the vectors of σ = 0 are right on both sides
    _, S, _ = exact(matrix, 8, end)
    assert torch.allclose(found.S.double(), S, atol=1e-6 * (float(S[0]) if end == "top" else 1e2) + 1e-30)
    if not true_rank:
        assert found.energy == 0


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("width", [64, 576])
def test_ties_are_named_and_any_of_them_will_do(end: str, width: int) -> None:
    """Forty equal values where eight are asked for: no subspace is the right one, every value is."""
    values = torch.ones(width)
    values[:40] = 10
    values[-40:] = 0.1
    matrix = with_spectrum(values, width, width, torch.float64)
    found = find(end, matrix, 8)
    assert_sound(found, matrix, 8)
    assert torch.allclose(found.S, torch.full((8,), 10.0 if end == "top" else 0.1, dtype=torch.float64))
    assert find(end, torch.eye(width), 8).angle == 1


def test_no_multiplicity_hides_a_value() -> None:
    """Sixteen equal values and then others: a block narrower than the rank would miss some of them."""
    values = torch.ones(640)
    values[:16], values[16:20] = 10, 9
    found = top_singular(with_spectrum(values, 640, 640), 18, generator=generator())
    assert found.method == "krylov"
    assert torch.allclose(found.S, torch.tensor([10.0] * 16 + [9.0] * 2), rtol=1e-5)


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("width", [64, 600])
def test_the_seed_decides_and_nothing_else(end: str, width: int) -> None:
    matrix = gaussian(width, width)
    before = torch.get_rng_state()
    first, again, other = (find(end, matrix, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.U, again.U) and torch.equal(first.S, again.S) and torch.equal(first.Vh, again.Vh)
    assert angle(other.Vh, first.Vh) < 1e-3


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("shape", [(64, 64), (40, 96), (520, 520), (520, 560)], ids=str)
def test_the_sign_of_a_triplet_is_its_own(shape: tuple[int, int], end: str, monkeypatch: Any) -> None:
    """Whatever the method, the seed, and rows of zeros: what two machines find can be averaged."""
    matrix = geometric(*shape, 1e3)
    first = find(end, matrix, 8)
    at = first.Vh.abs().argmax(1, keepdim=True)
    assert bool((first.Vh.gather(1, at) > 0).all())
    others = [find(end, matrix, 8, seed=1), find(end, matrix.flip(0), 8), find(end, 2 * matrix, 8)]
    if end == "top":
        others.append(find(end, torch.cat([matrix, torch.zeros(7, shape[1])]), 8))
    for method in ("_krylov", "_inverse", "_gram"):
        monkeypatch.setattr(singular, method, lambda *_, **__: None)
    others.append(find(end, matrix, 8))
    assert others[-1].method == "svd"
    for other in others:
        assert torch.allclose(other.Vh, first.Vh, atol=5e-3)


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("method", ["_krylov", "_inverse", "_gram"])
def test_a_method_that_fails_hands_over(end: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(520, 520)
    monkeypatch.setattr(singular, method, lambda *_, **__: None)
    found = find(end, matrix, 8)
    assert found.method != method.removeprefix("_")
    assert distance(part(found.U, found.S, found.Vh), part(*exact(matrix, 8, end))) < 1e-3


@pytest.mark.parametrize("end", FIND)
def test_an_eigendecomposition_that_gives_up_hands_over(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    matrix = gaussian(60, 60)
    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    found = find(end, matrix, 8)
    assert found.method == "svd"
    assert distance(part(found.U, found.S, found.Vh), part(*exact(matrix, 8, end))) < 1e-5


@pytest.mark.parametrize("end", FIND)
def test_too_few_blocks_are_not_an_answer(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(520, 520)
    monkeypatch.setattr(singular, "KRYLOV_BLOCKS", 4 / 520)
    monkeypatch.setattr(singular, "INVERSE_BLOCKS", 2 / 520)
    found = find(end, matrix, 8)
    assert found.method == "gram"
    assert distance(part(found.U, found.S, found.Vh), part(*exact(matrix, 8, end))) < 1e-3


@pytest.mark.parametrize(("end", "method"), [("top", "krylov"), ("bottom", "inverse")])
def test_large_matrices_take_the_fast_method(end: str, method: str) -> None:
    assert find(end, gaussian(520, 520), 8).method == method
    assert find(end, gaussian(520, 520), 100).method == "gram"
    assert find(end, gaussian(100, 520), 8).method == "gram"


def test_a_tighter_tolerance_is_kept() -> None:
    matrix = power_law(600, 600, 0.25)
    loose, tight = (find("top", matrix.double(), 8, tolerance=t) for t in (1e-2, 1e-8))
    assert tight.angle <= 1e-8 < loose.angle <= 1e-2
    assert angle(tight.Vh, exact(matrix, 8, "top")[2]) < 1e-7


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_and_autocast_do_not_reach_it(precision: str) -> None:
    matrix = gaussian(600, 600)
    plain = top_singular(matrix, 8, generator=generator())
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = top_singular(matrix, 8, generator=generator())
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.Vh, plain.Vh)


def test_parameters_and_default_devices_and_dtypes_do_not_matter() -> None:
    matrix = gaussian(600, 600)
    plain = top_singular(matrix, 8, generator=generator())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = top_singular(torch.nn.Parameter(matrix), 8, generator=generator())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.Vh, plain.Vh) and not found.Vh.requires_grad


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_any_layout_in_memory(strides: str) -> None:
    base = gaussian(600, 600)
    matrix = {"transposed": base.mT, "sliced": base[:, ::2], "expanded": base[:1].expand(600, 600)}[strides]
    found = top_singular(matrix, 4, generator=generator())
    assert distance(part(found.U, found.S, found.Vh), part(*exact(matrix, 4, "top"))) < 1e-3


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("shape", [(40, 60), (640, 520), (520, 640)], ids=str)
def test_a_product_is_its_own_matrix(
    shape: tuple[int, int], formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = gaussian(*shape)
    right = with_spectrum(torch.arange(1, shape[1] + 1).double() ** -0.5, shape[1], shape[1])
    monkeypatch.setattr(Product, "cheaper_formed", lambda self, rank: formed)
    found = top_singular(Product(left, right), 8, generator=generator())
    matrix = left.double() @ right.double()
    assert angle(found.Vh, exact(matrix, 8, "top")[2]) < 1e-3
    if formed:
        assert_sound(found, matrix, 8)
    else:
        assert found.energy is None and found.residual < 1e-3


def test_products_are_formed_where_that_is_cheap() -> None:
    assert Product(torch.empty(100, 100), torch.empty(100, 100)).cheaper_formed(8)
    assert not Product(torch.empty(8192, 8192), torch.empty(8192, 8192)).cheaper_formed(8)


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(end: str, value: float) -> None:
    matrix = gaussian(20, 20)
    matrix[3, 4] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        find(end, matrix, 4)


@pytest.mark.parametrize("end", FIND)
def test_bad_questions_are_refused(end: str) -> None:
    with pytest.raises(ValueError, match="rank 0 is out of range"):
        find(end, gaussian(5, 9), 0)
    with pytest.raises(ValueError, match="1 to 5"):
        find(end, gaussian(5, 9), 6)
    with pytest.raises(ValueError, match="dequantize"):
        find(end, torch.ones(5, 5, dtype=torch.int8), 2)
    with pytest.raises(ValueError, match="matrix"):
        find(end, torch.ones(5, 5, 5), 2)
    with pytest.raises(ValueError, match="no product"):
        Product(gaussian(5, 4), gaussian(5, 4))


@pytest.mark.parametrize("end", FIND)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-200), (torch.float64, 1e200)],
    ids=str,
)
@pytest.mark.parametrize("width", [30, 520])
def test_very_large_and_very_small_values(width: int, dtype: torch.dtype, scale: float, end: str) -> None:
    matrix = gaussian(width, width, dtype=dtype)
    found = find(end, matrix * scale, 4)
    U, S, Vh = exact(matrix, 4, end)
    assert torch.allclose(found.S.double() / scale, S, rtol=1e-4)
    assert angle(found.Vh, Vh) < 1e-3 and angle(found.U.mT, U.mT) < 1e-3
    assert found.energy == pytest.approx(find(end, matrix, 4).energy, rel=1e-4)
    assert found.residual < 1e-4


def test_products_of_very_large_and_small_factors() -> None:
    left, right = gaussian(40, 60), gaussian(60, 50, seed=4)
    found = top_singular(Product(left * 1e-25, right * 1e28), 4, generator=generator())
    assert torch.allclose(
        found.S.double() / 1e3, exact(left.double() @ right.double(), 4, "top")[1], rtol=1e-4
    )


def test_the_tilt_of_orthogonal_complements_is_seen_by_the_tests() -> None:
    """`angle` itself: equal spaces in other bases have none, orthogonal ones have 1."""
    basis = orthonormal(30, 8, 5).mT
    turned = orthonormal(4, 4, 6) @ basis[:4]
    assert angle(turned, basis[:4]) < 1e-12
    assert angle(basis[4:], basis[:4]) == pytest.approx(1)
