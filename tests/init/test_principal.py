"""PiSSA and MiLoRA: s·B·A is the exact part of the weight, at every scaling and spectrum."""

from __future__ import annotations

import pytest
import torch

from lowrank.init import Factors, Initializer, Minor, Principal
from lowrank.models.projections import Role
from tests.linalg.matrices import angle, distance, exact, gaussian, generator, geometric, part, power_law

ENDS: dict[str, Initializer] = {"top": Principal(), "bottom": Minor()}
WEIGHTS = {
    "gaussian": lambda: gaussian(70, 50),
    "k^-0.25, wide": lambda: power_law(60, 90, 0.25),
    "k^-0.25, large": lambda: power_law(768, 768, 0.25),
    "condition 1e5": lambda: geometric(80, 80, 1e5),
    "condition 1e5, large": lambda: geometric(640, 640, 1e5),
    "bf16": lambda: gaussian(70, 50, dtype=torch.bfloat16),
    "fp64": lambda: gaussian(70, 50, dtype=torch.float64),
}


def start(end: str, weight: torch.Tensor, rank: int = 16, scaling: float = 1.0) -> Factors:
    return ENDS[end](weight, rank, scaling, role=Role.OTHER, statistics=None, generator=generator())


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("end", ENDS)
def test_scaled_product_is_the_exact_part(end: str, weight: str, scaling: float) -> None:
    W = WEIGHTS[weight]()
    factors = start(end, W, scaling=scaling)
    U, S, Vh = exact(W, 16, end)
    assert distance(scaling * factors.B.double() @ factors.A.double(), part(U, S, Vh)) < 1e-3
    rows = factors.A.double() / factors.A.double().norm(dim=1, keepdim=True)
    assert angle(rows, Vh) < 2e-3
    assert factors.energy == pytest.approx(float(S.square().sum() / W.double().square().sum()), rel=1e-3)
    assert not factors.frozen


@pytest.mark.parametrize("end", ENDS)
def test_both_factors_carry_the_root_of_each_value(end: str) -> None:
    W = gaussian(70, 50)
    factors = start(end, W, 8, scaling=4.0)
    root = (exact(W, 8, end)[1] / 4.0).sqrt()
    assert torch.allclose(factors.A.double().norm(dim=1), root, rtol=1e-4)
    assert torch.allclose(factors.B.double().norm(dim=0), root, rtol=1e-4)


@pytest.mark.parametrize("end", ENDS)
def test_the_whole_weight_at_full_rank(end: str) -> None:
    W = gaussian(20, 30)
    factors = start(end, W, 20, scaling=0.5)
    assert distance(0.5 * factors.B @ factors.A, W.double()) < 1e-5
    assert factors.energy == pytest.approx(1)


@pytest.mark.parametrize("width", [24, 600])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("true_rank", [0, 3])
def test_zero_singular_values_are_floored_far_below_the_weight(true_rank: int, end: str, width: int) -> None:
    W = gaussian(width, true_rank) @ gaussian(true_rank, width, seed=4)
    factors = start(end, W, 8)
    lengths = factors.A.norm(dim=1) * factors.B.norm(dim=0)
    typical = float(W.norm()) / width**0.5 or 1.0
    assert float(lengths.min()) >= 0.9e-6 * typical
    missing = part(*exact(W, 8, end)) - factors.B.double() @ factors.A.double()
    assert float(missing.norm()) <= 1e-5 * (float(W.norm()) or width)
