"""How the factors of an adapter start: one idea a file, each a frozen dataclass."""

from lowrank.init.activation import ActivationPrincipal
from lowrank.init.base import Factors, Initializer, frozen_factors
from lowrank.init.by_role import ByRole
from lowrank.init.covariance import CovarianceOriented
from lowrank.init.gradient import GradientAligned
from lowrank.init.kaiming import FrozenA, Gaussian, Kaiming
from lowrank.init.orthogonal import Orthogonal
from lowrank.init.principal import Minor, Principal
from lowrank.init.task_aligned import TaskAligned

__all__ = [
    "ActivationPrincipal",
    "ByRole",
    "CovarianceOriented",
    "Factors",
    "FrozenA",
    "Gaussian",
    "GradientAligned",
    "Initializer",
    "Kaiming",
    "Minor",
    "Orthogonal",
    "Principal",
    "TaskAligned",
    "frozen_factors",
]
