"""Rank allocators: how a budget is spent."""

from lowrank.allocate.base import Allocator
from lowrank.allocate.explained_variance import ExplainedVariance
from lowrank.allocate.sensitivity import Sensitivity
from lowrank.allocate.spectral import EnergyRank, StableRank
from lowrank.allocate.uniform import Uniform

__all__ = ["Allocator", "EnergyRank", "ExplainedVariance", "Sensitivity", "StableRank", "Uniform"]
