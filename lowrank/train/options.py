"""What `fit` was asked for: the checks, when evaluating and saving are due, what a continued run repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from lowrank.batches import Loss
from lowrank.train.groups import Groups

COUNTS = ("epochs", "steps", "accumulate", "evaluate_every", "every", "keep")
CHECKS = (None, "step", "late")


@dataclass(frozen=True)
class Options:
    """The options of `fit`, by their names there.

    last, usual: the number of steps, and how often something is due by default, once `over` has said so.

    Raises ValueError for a value that means nothing, or that asks for what there is nothing to do with.
    """

    loss: Loss
    weight: Callable[[Any], float] | None
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    checkpoint: str | PathLike[str] | None
    epochs: int
    steps: int | None
    lr: float | str
    weight_decay: float
    betas: tuple[float, float]
    schedule: str
    warmup: int | float
    accumulate: int
    clip: float | None
    autocast: torch.dtype | None
    evaluate_every: int | None
    seed: int | None
    every: int | None
    keep: int
    resume: bool
    gradient_checkpointing: bool
    compile: bool | Mapping[str, Any]
    allow_unused: bool
    check: str | None
    report: bool = False
    last: int = 0
    usual: int = 0

    def __post_init__(self) -> None:
        for name in COUNTS:
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"{name}: expected a positive integer, got {count!r}")
        if isinstance(self.lr, str) and not self.measures:
            raise ValueError(f"lr: expected a positive number, or 'auto' to measure it, got {self.lr!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(
                f"clip: expected a positive norm, or None to leave the gradient as it is, got {self.clip}"
            )
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {self.autocast}")
        if self.evaluate_every is not None and self.evaluate is None:
            raise ValueError("evaluate_every= needs evaluate=")
        if self.every is not None and self.checkpoint is None:
            raise ValueError("every= needs checkpoint=, the folder to save in")
        if self.check not in CHECKS:
            raise ValueError(f"check: expected 'step', 'late' or None, got {self.check!r}")

    @property
    def measures(self) -> bool:
        """Is the learning rate measured, not given?"""
        return self.lr == "auto"

    def over(self, groups: Groups) -> Options:
        """With the defaults filled in: evaluating is due once an epoch, or at the end where ``steps`` are
        given, and saving where evaluating is."""
        usual = (groups.per_epoch if self.steps is None else None) or groups.steps
        return replace(self, usual=usual, last=groups.steps)

    def evaluates_after(self, step: int) -> bool:
        return self.evaluate is not None and self._due(step, self._often)

    def saves_after(self, step: int) -> bool:
        return self.checkpoint is not None and self._due(step, self.every or self._often)

    def settles_after(self, step: int) -> bool:
        """Must all be known of a step before the next?"""
        return step == self.last or self.evaluates_after(step) or self.saves_after(step)

    @property
    def _often(self) -> int:
        return self.evaluate_every or self.usual

    def _due(self, step: int, often: int) -> bool:
        return step == self.last or step % often == 0

    def compared(self, processes: int) -> dict[str, Any]:
        """What a run that continues a checkpoint must be asked for too."""
        names = (
            "epochs",
            "steps",
            "accumulate",
            "clip",
            "seed",
            "schedule",
            "warmup",
            "gradient_checkpointing",
        )
        return {
            **{name: getattr(self, name) for name in names},
            "lr": "auto" if self.measures else "a number",
            "autocast": str(self.autocast),
            "processes": processes,
            "evaluate_every": self._often if self.evaluate is not None else None,
            "compile": bool(self.compile),
        }
