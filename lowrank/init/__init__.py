"""How the factors of an adapter start: one idea a file, each a frozen dataclass."""

from lowrank.init.base import Factors, Initializer, frozen_factors
from lowrank.init.by_role import ByRole
from lowrank.init.kaiming import Gaussian, Kaiming
from lowrank.init.orthogonal import Orthogonal
from lowrank.init.principal import Minor, Principal
from lowrank.init.task_aligned import TaskAligned

__all__ = [
    "ByRole",
    "Factors",
    "Gaussian",
    "Initializer",
    "Kaiming",
    "Minor",
    "Orthogonal",
    "Principal",
    "TaskAligned",
    "frozen_factors",
]
