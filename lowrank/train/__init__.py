"""Training whatever requires grad: `fit`. It knows no adapter."""

from lowrank.train.history import History, Record
from lowrank.train.loop import fit
from lowrank.train.step import NonFiniteGradient, NonFiniteLoss

__all__ = ["History", "NonFiniteGradient", "NonFiniteLoss", "Record", "fit"]
