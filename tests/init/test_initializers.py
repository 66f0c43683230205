"""What holds of every initializer, whatever it does: one row a method."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.init import (
    ByRole,
    Factors,
    FrozenA,
    Gaussian,
    Initializer,
    Kaiming,
    Minor,
    Orthogonal,
    Principal,
    TaskAligned,
    frozen_factors,
)
from lowrank.models.projections import Role
from tests.linalg.matrices import gaussian, generator

METHODS: dict[str, Initializer] = {
    "Kaiming": Kaiming(),
    "Gaussian": Gaussian(),
    "FrozenA": FrozenA(),
    "Principal": Principal(),
    "Minor": Minor(),
    "Orthogonal": Orthogonal(),
    "TaskAligned": TaskAligned(),
    "ByRole": ByRole({Role.QUERY: Principal(), Role.VALUE: Minor()}, otherwise=TaskAligned()),
}
RANDOM = ("Kaiming", "Gaussian", "FrozenA")
AT_ZERO = {*RANDOM, "TaskAligned"}
SHAPES = [(24, 24), (16, 40), (40, 16)]


def statistics(into: int) -> ProjectionStatistics:
    inputs = gaussian(2 * into, into, seed=7)
    return ProjectionStatistics(covariance=inputs.mT @ inputs / len(inputs))


def start(
    method: str, weight: Tensor, rank: int = 4, scaling: float = 2.0, role: Role = Role.QUERY, seed: int = 0
) -> Factors:
    measured = statistics(weight.shape[1])
    return METHODS[method](weight, rank, scaling, role=role, statistics=measured, generator=generator(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_factors_are_fp32_and_the_weight_is_only_read(
    method: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.nn.Parameter(gaussian(*shape, dtype=dtype))
    kept = weight.detach().clone()
    for role in (Role.QUERY, Role.VALUE, Role.DOWN):
        factors = start(method, weight, role=role)
        assert (factors.A.shape, factors.B.shape) == ((4, shape[1]), (shape[0], 4))
        for factor in (factors.A, factors.B):
            assert factor.dtype is torch.float32 and factor.device == weight.device
            assert not factor.requires_grad and factor.is_contiguous() and bool(factor.isfinite().all())
        assert factors.energy is None or 0 <= factors.energy <= 1
        assert factors.frozen == frozen_factors(METHODS[method], role)
    assert torch.equal(weight, kept) and weight.grad is None


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_any_rank_up_to_the_whole(method: str, shape: tuple[int, int], rank: int) -> None:
    factors = start(method, gaussian(*shape), rank)
    assert (len(factors.A), factors.B.shape[1]) == (rank, rank)


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_decides_and_nothing_else(method: str) -> None:
    weight = gaussian(24, 24)
    before = torch.get_rng_state()
    first, again = start(method, weight), start(method, weight)
    assert torch.equal(first.A, again.A) and torch.equal(first.B, again.B)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(start(method, weight).A, first.A)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zero", "rank 2"])
def test_a_start_that_can_be_trained(method: str, kind: str) -> None:
    """One factor at zero is fine, both are not: A would get no gradient through B, nor B through A."""
    weight = torch.zeros(24, 24) if kind == "zero" else gaussian(24, 2) @ gaussian(2, 24, seed=4)
    for role in (Role.QUERY, Role.VALUE):
        factors = start(method, weight, role=role)
        assert bool(((factors.A.norm(dim=1) > 0) | (factors.B.norm(dim=0) > 0)).all())
        assert bool(factors.A.isfinite().all()) and bool(factors.B.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_where_it_starts(method: str) -> None:
    factors = start(method, gaussian(24, 24))
    assert bool((factors.B == 0).all()) == (method in AT_ZERO)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_data(method: str) -> None:
    init = METHODS[method]
    assert isinstance(init, Initializer)
    for twin in (copy.deepcopy(init), pickle.loads(pickle.dumps(init))):
        assert twin == init and hash(twin) == hash(init) and repr(twin) == repr(init)
    others: list[Any] = [other for name, other in METHODS.items() if name != method]
    assert init not in others and len({init, *others}) == len(METHODS)
    with pytest.raises(AttributeError, match="cannot assign to field 'rank'"):
        init.rank = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM])
def test_nan_in_a_weight_is_refused(method: str) -> None:
    weight = gaussian(24, 24)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        start(method, weight)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM])
def test_a_rank_beyond_the_weight_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="rank 17 is out of range"):
        start(method, gaussian(16, 40), 17)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM])
def test_a_weight_without_data_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="meta device"):
        start(method, torch.empty(24, 24, device="meta"))


@pytest.mark.parametrize("method", RANDOM)
def test_weights_without_data_are_enough_for_random_starts(method: str) -> None:
    weight = torch.empty(40, 24, device="meta", dtype=torch.bfloat16)
    factors = METHODS[method](weight, 4, 1.0, role=Role.OTHER, statistics=None, generator=generator())
    assert factors.A.is_meta and factors.B.is_meta
