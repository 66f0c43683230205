"""The start of LoRA-GA: the first step of the adapter follows the gradient of the whole weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.init.base import Factors
from lowrank.init.spectrum import top_singular
from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class GradientAligned:
    """LoRA-GA (2407.05000, section 3): A holds ∇W's right singular vectors 1 … r, B the left ones r+1 … 2r.

    So the rank is at most ``min(out, in) / 2``. Both are scaled by ``out^¼ / √γ``, the paper's stable scale,
    and anchored. A projection that the loss does not reach has no gradient to follow: its vectors are
    orthonormal and arbitrary.

    Args:
        gamma: γ; the larger it is, the smaller the start.
    """

    gamma: float = 16.0

    needs = frozenset({"gradient"})

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive: {self.gamma}")

    def largest_rank(self, shape: tuple[int, int], role: Role) -> int:
        """Half of the directions that a gradient ``(out, in)`` has: 2·rank are taken."""
        return min(shape) // 2

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        *,
        role: Role,
        statistics: ProjectionStatistics | None,
        generator: torch.Generator,
    ) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is A's share of ‖∇W‖²_F.

        Raises:
            ValueError: the gradient was not measured; twice the rank exceeds ``min(out, in)``.
        """
        if statistics is None or statistics.gradient is None:
            raise ValueError("GradientAligned needs the gradient: pass batches= to wrap_model")
        if 2 * rank > min(weight.shape):
            raise ValueError(
                f"LoRA-GA takes 2·rank directions, and a weight of shape {tuple(weight.shape)} has "
                f"{min(weight.shape)}: rank {rank} is too large for it"
            )
        gradient = statistics.gradient.to(weight.device)
        found = top_singular(gradient, 2 * rank, generator=generator)
        scale = weight.shape[0] ** 0.25 / self.gamma**0.5
        held = found.S[:rank].double().square().sum()
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        return Factors(
            A=(scale * found.Vh[:rank]).float(),
            B=(scale * found.U[:, rank:]).float(),
            energy=float(held / norm) if norm else None,
        )
