"""Training whatever requires grad: `fit`. It knows no adapter."""

from lowrank.train.callbacks import Callback, EarlyStopping, KeepBest
from lowrank.train.checkpoints import CheckpointError, DamagedCheckpointWarning
from lowrank.train.events import TensorBoard
from lowrank.train.history import History, Record
from lowrank.train.loop import fit
from lowrank.train.run import SkippedStepWarning
from lowrank.train.signals import Stopped
from lowrank.train.step import NonFiniteGradient, NonFiniteLoss

__all__ = [
    "Callback",
    "CheckpointError",
    "DamagedCheckpointWarning",
    "EarlyStopping",
    "History",
    "KeepBest",
    "NonFiniteGradient",
    "NonFiniteLoss",
    "Record",
    "SkippedStepWarning",
    "Stopped",
    "TensorBoard",
    "fit",
]
