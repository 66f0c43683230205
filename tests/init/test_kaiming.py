"""The random starts: their distribution, and that a large weight is never copied."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.init import Gaussian, Initializer, Kaiming
from lowrank.models.projections import Role
from tests.linalg.matrices import gaussian, generator


def draw(init: Initializer, weight: torch.Tensor, rank: int) -> torch.Tensor:
    return init(weight, rank, 1.0, role=Role.OTHER, statistics=None, generator=generator()).A


def test_kaiming_is_what_the_authors_draw() -> None:
    """`nn.init.kaiming_uniform_(A, a=√5)`, number for number, from the same generator."""
    A = draw(Kaiming(), gaussian(50, 300), 8)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(8, 300), a=sqrt(5), generator=generator())
    assert torch.allclose(A, expected, rtol=1e-6)


@pytest.mark.parametrize("rank", [2, 16])
def test_gaussian_has_standard_deviation_one_over_rank(rank: int) -> None:
    A = draw(Gaussian(), gaussian(4, 20_000), rank)
    assert float(A.std()) == pytest.approx(1 / rank, rel=0.02)
    assert abs(float(A.mean())) < 0.02 / rank


class Sizes(TorchDispatchMode):
    """The size of the largest tensor made inside."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.numel())
        return made


@pytest.mark.parametrize("init", [Kaiming(), Gaussian()])
def test_the_weight_is_not_copied(init: Initializer) -> None:
    weight = gaussian(300, 200, dtype=torch.bfloat16)
    with Sizes() as sizes:
        draw(init, weight, 4)
    assert sizes.largest <= 4 * 300
