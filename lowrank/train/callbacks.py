"""What may watch a run: one protocol, early stopping, and keeping the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from lowrank.train.history import History, Record
from lowrank.train.state import Trained


class Watched(Protocol):
    """What a callback sees of the run."""

    model: nn.Module
    history: History
    trained: Trained
    stop: str  # set it to a reason, and the run ends after this step


class Callback:
    """Called after each step and at the end. Derive from it and override what you need.

    A callback that remembers something has ``state_dict``, of tensors, numbers, strings and containers, and
    ``load_state_dict``: they go into the checkpoints.

    needs_evaluate: without ``fit(evaluate=...)`` it would do nothing, which is an error then.
    """

    needs_evaluate: ClassVar[bool] = False

    def after_step(self, run: Watched, record: Record) -> None:
        """``record`` is the step's, evaluation included; the model is in train mode."""

    def at_end(self, run: Watched) -> None:
        """After the last step, once its checkpoint is saved; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """``state`` is what ``state_dict`` gave."""


@dataclass
class _Best(Callback):
    """Knows the best value of a metric so far.

    metric: of ``evaluate``; larger is better, unless ``smaller`` says otherwise.
    """

    needs_evaluate: ClassVar[bool] = True
    metric: str
    smaller: bool = False
    best: float = field(default=math.nan, init=False)
    step: int = field(default=0, init=False)  # of the best

    def improved(self, record: Record) -> bool | None:
        """Is this evaluation the best yet? None where there was none after this step."""
        if not record.evaluation:
            return None
        if self.metric not in record.evaluation:
            raise ValueError(f"evaluate gives {sorted(record.evaluation)}, and not {self.metric!r}")
        value = record.evaluation[self.metric]
        better = value < self.best if self.smaller else value > self.best
        if math.isnan(value) or not (better or math.isnan(self.best)):
            return False
        self.best, self.step = value, record.step
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.step = state["best"], state["step"]


@dataclass
class EarlyStopping(_Best):
    """Ends the run when ``metric`` has not improved in ``patience`` evaluations in a row."""

    patience: int = 3
    without: int = field(default=0, init=False)

    def after_step(self, run: Watched, record: Record) -> None:
        improved = self.improved(record)
        if improved is None:
            return
        self.without = 0 if improved else self.without + 1
        if self.without >= self.patience:
            run.stop = f"{self.metric} has not improved since step {self.step}, where it was {self.best:.6g}"

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "without": self.without}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.without = state["without"]


@dataclass
class KeepBest(_Best):
    """At the end, puts back the tensors that the best evaluation was made with. They are kept on the CPU."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def after_step(self, run: Watched, record: Record) -> None:
        if self.improved(record):
            self.tensors = {
                kind: {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
                for kind, tensors in run.trained.state_dict().items()
            }

    def at_end(self, run: Watched) -> None:
        if self.tensors:
            run.trained.load_state_dict(self.tensors)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.tensors = state["tensors"]
