"""The start of LoRA-GA: the first step of the adapter follows the gradient of the whole weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.init.base import Factors, Given, Start
from lowrank.linalg import top_singular
from lowrank.models.projections import Role


@dataclass(frozen=True)
class GradientAligned(Start):
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
            raise ValueError(f"gamma: expected a positive number, got {self.gamma}")

    def largest_rank(self, shape: tuple[int, int], role: Role) -> int:
        """Half of the directions that a gradient ``(out, in)`` has: 2·rank are taken."""
        return min(shape) // 2

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is A's share of ‖∇W‖²_F.

        Raises:
            ValueError: the gradient was not measured; twice the rank exceeds ``min(out, in)``.
        """
        if given.statistics is None or given.statistics.gradient is None:
            raise ValueError("GradientAligned needs the gradient: pass batches= to wrap_model")
        if 2 * given.rank > min(given.weight.shape):
            raise ValueError(
                f"LoRA-GA takes 2·rank directions, and a weight of shape {tuple(given.weight.shape)} has "
                f"{min(given.weight.shape)}: rank {given.rank} is too large for it"
            )
        gradient = given.statistics.gradient.to(given.weight.device)
        found = top_singular(gradient, 2 * given.rank, generator=given.generator)
        scale = given.weight.shape[0] ** 0.25 / self.gamma**0.5
        held = found.S[: given.rank].double().square().sum()
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        return Factors(
            A=(scale * found.Vh[: given.rank]).float(),
            B=(scale * found.U[:, given.rank :]).float(),
            energy=float(held / norm) if norm else None,
        )
