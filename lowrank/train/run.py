"""A run between two of its steps: everything that decides how it goes on, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lowrank.batches import count_tokens
from lowrank.train.callbacks import Callback
from lowrank.train.checkpoints import CheckpointError
from lowrank.train.data import Cursor
from lowrank.train.generators import generators, set_generators
from lowrank.train.history import History, Record
from lowrank.train.optim import Schedule
from lowrank.train.reach import unmoved, unused
from lowrank.train.state import Trained, differences, load_optimizer
from lowrank.train.step import NO_TERMS, Gradients


@dataclass
class Run:
    """Takes a step when asked; ``state_dict`` and ``load_state_dict`` are for in between.

    options: what the run was asked to do; a state that was saved with others is refused.
    """

    model: nn.Module
    gradients: Gradients
    schedule: Schedule
    cursor: Cursor
    options: Mapping[str, Any]
    callbacks: Sequence[Callback] = ()
    allow_unused: bool = False
    history: History = field(default_factory=History)
    stop: str = ""  # why it is to end before its last step
    seconds: float = 0.0
    checked: bool = False  # does the loss reach what is to train?

    def __post_init__(self) -> None:
        self.optimizer = self.gradients.optimizer
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = Trained(self.model, self.parameters)
        self._reached = list(self.model.parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.gradients.parameters

    @property
    def step(self) -> int:
        """The steps that were taken."""
        return len(self.history)

    @property
    def over(self) -> bool:
        return bool(self.stop) or self.step == self.schedule.steps

    def clear(self) -> None:
        """No gradient anywhere: in what is trained, and in what the loss reaches besides."""
        self.optimizer.zero_grad()
        for parameter in self._reached:  # a walk over the model's modules would take longer than the rest
            parameter.grad = None

    def take(self, epoch: int, place: int, group: Sequence[Any], since: float) -> Record:
        """One optimizer step over ``group``, which is in the epoch from ``place`` on.

        since: when it began, by `perf_counter`. Its record is the caller's to complete and append.
        """
        for target, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            target["lr"] = peak * self.schedule(self.step)
        outcome = self.gradients(group, self.step + 1, place)
        if outcome.skipped == NO_TERMS:
            warnings.warn(
                "a step's batches have no label that the loss counts: it updates nothing "
                '(its record says skipped="no labels")',
                stacklevel=3,
            )
        elif not self.checked:
            check_reached(self.model, self.parameters, self.allow_unused)
            self.checked = True
        if not outcome.skipped:
            self.optimizer.step()
        self.clear()
        spent = perf_counter() - since
        self.seconds += spent
        return Record(
            step=self.step + 1,
            epoch=epoch,
            loss=outcome.loss,
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=outcome.norm,
            tokens_per_second=self.gradients.parallel.sum(sum(map(count_tokens, group))) / spent,
            seconds=self.seconds,
            skipped=outcome.skipped,
        )

    # -- saving and loading ---------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """Everything that a run that goes on must have in common with the one that was saved."""
        groups = [
            {k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups
        ]
        return {
            **self.options,
            "steps in all": self.schedule.steps,
            "batches in an epoch": self.cursor.groups.length,
            "learning rates": str(self.peaks),
            "optimizer": f"{type(self.optimizer).__name__}, {groups}",
            "callbacks": str([type(callback).__name__ for callback in self.callbacks]),
            "trains": self.trained.described(),
            "layer": self.trained.layers(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "options": self.described(),
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.gradients.scaler.state_dict(),
            "data": self.cursor.state_dict(),
            "generators": generators(),
            "history": [record.to_json() for record in self.history],
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "run": {"seconds": self.seconds, "checked": self.checked, "stop": self.stop},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the state is of a run with other options; then nothing is changed."""
        if changed := differences(state["options"], self.described()):
            lines = "\n  ".join(changed)
            raise CheckpointError(
                f"the checkpoint was saved by a run that differs from this one:\n  {lines}\n"
                "to continue it pass the same options; to start anew, another folder or resume=False, which "
                "deletes what is there"
            )
        self.trained.load_state_dict(state["trained"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.gradients.scaler.load_state_dict(state["scaler"])
        self.history.records[:] = map(Record.from_json, state["history"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        self.seconds, self.checked, self.stop = (state["run"][key] for key in ("seconds", "checked", "stop"))
        if not self.over:
            self.cursor.load_state_dict(state["data"])
        set_generators(state["generators"])


def check_reached(model: nn.Module, parameters: Sequence[nn.Parameter], allow_unused: bool) -> None:
    """Raises ValueError where a parameter has no gradient; warns where a layer's is zero."""
    if allow_unused:
        return
    if missing := unused(model, parameters):
        raise ValueError(
            f"the loss gives no gradient to {len(missing)} of what is to train: {', '.join(missing)}; "
            "freeze it, or pass allow_unused=True if a later batch may reach it"
        )
    if still := unmoved(model, parameters):
        warnings.warn(
            f"the first gradient is exactly zero in {len(still)} layers: {', '.join(still)}; "
            "they are called, but the loss does not depend on what they give",
            stacklevel=4,
        )


def data_seed() -> int:
    """The seed of the random numbers of the data, drawn from torch's generator."""
    return int(torch.randint(2**62, ()).item())
