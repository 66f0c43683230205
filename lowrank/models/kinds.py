"""Layers beside the linear ones that can be adapted: a table. Each kind has a file of its own.

They are targets only where they are asked for, by name or by their role.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.models.convolutions import convolution_problem
from lowrank.models.embeddings import embedding_problem, without_padding
from lowrank.models.families import Role


def _unchanged(module: nn.Module, A: Tensor) -> Tensor:
    return A


@dataclass(frozen=True)
class Kind:
    """How a layer that is not linear is adapted as a matrix ``(out, in)``.

    Args:
        role: of its projections.
        classes: of its modules.
        rows: the stored weight as ``(out, in)``, without a copy.
        problem: why a module of these classes cannot be adapted; empty where it can.
        start: what of a first A ``(rank, in)`` a module can use.
    """

    role: Role
    classes: tuple[type[nn.Module], ...]
    rows: Callable[[Tensor], Tensor]
    problem: Callable[[nn.Module], str]
    start: Callable[[nn.Module, Tensor], Tensor] = _unchanged


KINDS = (
    Kind(Role.EMBEDDING, (nn.Embedding,), torch.t, embedding_problem, without_padding),
    Kind(
        Role.CONV,
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        lambda weight: weight.flatten(1),
        convolution_problem,
    ),
)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of ``module``; None where it is linear, or nothing that can be adapted."""
    return next((kind for kind in KINDS if isinstance(module, kind.classes)), None)
