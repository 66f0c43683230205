"""The start of CorDA: singular triplets of the weight as the task's inputs weigh it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.init.base import Factors, Given, Start
from lowrank.linalg import bottom_singular, top_singular

# Of C's mean diagonal, as the authors'; they double it until C can be inverted, which in fp64 it is at once.
DAMPING = 0.01


@dataclass(frozen=True)
class CovarianceOriented(Start):
    """CorDA (2406.05223): with ``W·C = U·Σ·Vᵀ``, ``A = √(Σ/s)·Vᵀ·C⁻¹`` and ``B = U·√(Σ/s)``; anchored.

    C is the second moment of the inputs. ``preserve=False`` takes the ``rank`` largest triplets, which
    suit the previewed instructions; ``preserve=True`` the smallest, which leave alone what the sampled
    knowledge uses. Where the inputs are all zero, as of an expert that no token was routed to, C is the
    identity, so that the triplets are the weight's own.
    """

    preserve: bool = False

    needs = frozenset({"moment"})

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is of W·C.

        Raises:
            ValueError: the moment was not measured; a rank out of range.
        """
        moment = None if given.statistics is None else given.statistics.moment
        if moment is None:
            raise ValueError("CovarianceOriented needs the moment of the inputs: pass batches= to wrap_model")
        moment = moment.to(given.weight.device)
        if not moment.any():
            moment = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        moment.diagonal().add_(DAMPING * moment.diagonal().mean())
        part = bottom_singular if self.preserve else top_singular
        found = part(given.weight.double() @ moment, given.rank, generator=given.generator)
        root = (found.S / given.scaling).sqrt()
        A = torch.cholesky_solve((root[:, None] * found.Vh).T, torch.linalg.cholesky(moment)).T
        return Factors(A=A.float(), B=(found.U * root).float(), energy=found.energy)
