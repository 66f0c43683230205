"""Sums over the inputs of a projection, from which nothing cancels: what covariance and moment are made of.

Matrices hold their lower triangle only until the end, in fp32 or better; means and counts are fp64 and int.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank.linalg.precision import fast_precision, full_precision, lower_gram

AllReduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes, where the tensor is."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The tokens of one input of one example (rows, in), in fp32 or better, without padding.

    ``half`` says that fp32 copies of half precision are meant, whose products may be fast; ``home`` is where
    sums are kept.
    """

    values: Tensor
    half: bool
    home: torch.device

    def centred(self) -> tuple[Tensor, Tensor]:
        """Around their mean, and that mean (in,) in fp64: however large it is, only theirs is rounded."""
        mean = self.values.mean(0, dtype=torch.float64)
        return (self.values - mean).to(self.values.dtype), mean

    def add_scatter(self, total: Tensor | None, centred: Tensor) -> Tensor:
        """``total`` plus ``centredᵀ·centred``, its lower triangle."""
        if total is None:
            width = centred.shape[1]
            total = torch.zeros(width, width, dtype=centred.dtype, device=self.home)
        with (fast_precision if self.half else full_precision)(centred.device):
            if self.home == centred.device:
                return lower_gram(centred, total)
            return total.add_(lower_gram(centred).to(self.home))


class Sum(Protocol):
    """A matrix (in, in) that is summed over examples; ``matrix`` is None where nothing was seen."""

    @property
    def matrix(self) -> Tensor | None: ...

    def add(self, rows: Rows) -> None:
        """Adds one input of one example, or of several where the examples do not matter."""
        ...

    def reduce(self, zeros: Callable[[], Tensor], all_reduce: AllReduce) -> None:
        """Makes it the sum over all processes; ``zeros`` is a matrix for the one that saw nothing."""
        ...


class Spread:
    """The mean of all tokens and their scatter around it, pairwise (Chan, Golub & LeVeque 1983).

    count: tokens. mean: (in,), fp64. matrix: Σ (x − mean)(x − mean)ᵀ.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.matrix: Tensor | None = None

    def add(self, rows: Rows) -> None:
        count = len(rows.values)
        if not count:
            return
        centred, mean = rows.centred()
        mean = mean.to(rows.home)
        self.matrix = rows.add_scatter(self.matrix, centred)
        apart = mean if self.mean is None else mean - self.mean
        both = self.count + count
        if self.mean is not None:
            step = apart.to(self.matrix.dtype)
            self.matrix.addr_(step, step, alpha=self.count * count / both)
        self.mean = apart * (count / both) + (0 if self.mean is None else self.mean)
        self.count = both

    def reduce(self, zeros: Callable[[], Tensor], all_reduce: AllReduce) -> None:
        matrix = zeros() if self.matrix is None else self.matrix
        mean = matrix.new_zeros(len(matrix), dtype=torch.float64) if self.mean is None else self.mean
        count = int(all_reduce(torch.tensor(self.count)))
        common = all_reduce(mean * self.count) / max(count, 1)
        step = (mean - common).to(matrix.dtype)
        self.matrix = all_reduce(matrix.addr_(step, step, alpha=self.count))
        self.mean, self.count = common, count


class Covariance:
    """Σ over examples of the scatter of each one's tokens around their own mean.

    An input that never has more than one token an example, such as a pooler's, would have none: its scatter
    is around the mean of all examples.
    """

    def __init__(self) -> None:
        self.lone: Spread | None = Spread()  # until an example has two tokens
        self.within: Tensor | None = None

    @property
    def matrix(self) -> Tensor | None:
        return self.within if self.lone is None else self.lone.matrix

    def add(self, rows: Rows) -> None:
        if len(rows.values) > 1:
            self.lone = None
            self.within = rows.add_scatter(self.within, rows.centred()[0])
        elif self.lone is not None:
            self.lone.add(rows)

    def reduce(self, zeros: Callable[[], Tensor], all_reduce: AllReduce) -> None:
        if int(all_reduce(torch.tensor(int(self.lone is None)))):
            self.lone = None
        if self.lone is not None:
            self.lone.reduce(zeros, all_reduce)
        else:
            self.within = all_reduce(zeros() if self.within is None else self.within)
