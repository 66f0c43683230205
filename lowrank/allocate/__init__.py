"""Rank allocators: how a budget is spent."""

from lowrank.allocate.base import Allocator
from lowrank.allocate.sensitivity import Sensitivity
from lowrank.allocate.uniform import Uniform

__all__ = ["Allocator", "Sensitivity", "Uniform"]
