"""A run between two of its steps: everything that decides how it goes on, and nothing else."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import count_tokens
from lowrank.notices import LowrankWarning, UnusedLayerWarning, few
from lowrank.train.callbacks import Callback
from lowrank.train.checkpoints import CheckpointError
from lowrank.train.data import Cursor
from lowrank.train.generators import generators, set_generators
from lowrank.train.history import History, Record
from lowrank.train.late import Late, Unread, skipping
from lowrank.train.optim import Schedule
from lowrank.train.reach import reasons, unmoved, unused
from lowrank.train.state import Trained, differences, load_optimizer
from lowrank.train.step import NO_TERMS, Gradients, Outcome


class SkippedStepWarning(LowrankWarning):
    """A step updated nothing, since no label of its batches counts."""


@dataclass(frozen=True)
class _Step:
    """A step that was taken, without what is to be read of it."""

    step: int
    epoch: int
    lr: float
    tokens: int
    outcome: Unread | Outcome


@dataclass
class Run:
    """Takes a step when asked; ``state_dict`` and ``load_state_dict`` are for in between.

    options: what the run was asked to do; a state that was saved with others is refused.
    late: let the optimizer skip a step that was not finite, and read a step later that it was: see `Late`.
    """

    model: nn.Module
    gradients: Gradients
    schedule: Schedule
    cursor: Cursor
    options: Mapping[str, Any]
    callbacks: Sequence[Callback] = ()
    allow_unused: bool = False
    history: History = field(default_factory=History)
    late: bool = False
    stop: str = ""  # why it is to end before its last step
    seconds: float = 0.0
    checked: bool = False  # does the loss reach what is to train?

    def __post_init__(self) -> None:
        self.optimizer = self.gradients.optimizer
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        # As it is before the first step: some optimizers count in their groups.
        self._groups = str(
            [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        )
        self.trained = Trained(self.model, self.parameters)
        self._reached = list(self.model.parameters())
        self._late = Late(self.gradients)
        self._unread: deque[_Step] = deque()
        self._clock = perf_counter()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.gradients.parameters

    @property
    def step(self) -> int:
        """The steps whose records are there."""
        return len(self.history)

    @property
    def taken(self) -> int:
        """The steps that were taken, those that are to be read yet included."""
        return len(self.history) + len(self._unread)

    @property
    def over(self) -> bool:
        return bool(self.stop) or self.step == self.schedule.steps

    def clear(self) -> None:
        """No gradient anywhere: in what is trained, and in what the loss reaches besides."""
        self.optimizer.zero_grad()
        for parameter in self._reached:  # a walk over the model's modules would take longer than the rest
            parameter.grad = None

    def start_clock(self) -> None:
        """What was between two steps, such as an evaluation, is no time of training."""
        self._clock = perf_counter()

    def take(self, epoch: int, place: int, group: Sequence[Any]) -> None:
        """One optimizer step over ``group``, which is in the epoch from ``place`` on. See `records`."""
        share, step = self.schedule(self.taken), self.taken + 1
        for target, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(target["lr"], Tensor):
                target["lr"].fill_(peak * share)
            else:
                target["lr"] = peak * share
        lr = self.peaks[0] * share
        outcome: Unread | Outcome = (self._late if self.late else self.gradients)(group, step, place)
        if not self.checked:  # of the first step all must be known
            outcome = outcome.read()
        if isinstance(outcome, Unread):
            with skipping(self.optimizer, outcome.skip):
                self.optimizer.step()
        else:
            if outcome.skipped != NO_TERMS and not self.checked:
                check_reached(self.model, self.parameters, self.allow_unused)
                self.checked = True
            if not outcome.skipped:
                self.optimizer.step()
        self.clear()
        self._unread.append(_Step(step, epoch, lr, sum(map(count_tokens, group)), outcome))

    def records(self, every: bool) -> Iterator[Record]:
        """Those of the steps that were taken since, each the caller's to complete and append to ``history``
        before the next; of all but the last, where the run is late and ``every`` is false."""
        while len(self._unread) > (self.late and not every):
            taken = self._unread[0]
            outcome = taken.outcome.read()
            self._unread.popleft()
            if outcome.skipped == NO_TERMS:
                warnings.warn(
                    "a step's batches have no label that the loss counts: it updates nothing "
                    '(its record says skipped="no labels")',
                    SkippedStepWarning,
                    stacklevel=3,
                )
            now = perf_counter()
            spent, self._clock = now - self._clock, now
            self.seconds += spent
            yield Record(
                step=taken.step,
                epoch=taken.epoch,
                loss=outcome.loss,
                lr=taken.lr,
                grad_norm=outcome.norm,
                tokens_per_second=self.gradients.parallel.sum(taken.tokens) / spent,
                seconds=self.seconds,
                skipped=outcome.skipped,
            )

    @contextmanager
    def reading(self, shown: Callable[[Record], None]) -> Iterator[None]:
        """Where something is raised inside, the steps that can still be read get into the history."""
        try:
            yield
        except BaseException:
            with suppress(Exception):
                for record in self.records(every=True):
                    self.history.append(record)
                    shown(record)
            raise

    # -- saving and loading ---------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """Everything that a run that goes on must have in common with the one that was saved."""
        return {
            **self.options,
            "steps in all": self.schedule.steps,
            "batches in an epoch": self.cursor.groups.length,
            "learning rates": str(self.peaks),
            "optimizer": f"{type(self.optimizer).__name__}, {self._groups}",
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
            "run": {
                "seconds": self.seconds,
                "checked": self.checked,
                "stop": self.stop,
                "learning_rate": self.history.learning_rate,
            },
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
        advice = "freeze it, or pass allow_unused=True if a later batch may reach it"
        raise ValueError(
            f"the loss gives no gradient to {len(missing)} of what is to train: {few(missing, 8)}; "
            + ("; ".join(reasons(model, parameters)) or advice)
        )
    if still := unmoved(model, parameters):
        warnings.warn(
            f"the first gradient is exactly zero in {len(still)} layers: {few(still)}; "
            "they are called, but the loss does not depend on what they give",
            UnusedLayerWarning,
            stacklevel=4,
        )


def data_seed() -> int:
    """The seed of the random numbers of the data, drawn from torch's generator."""
    return int(torch.randint(2**62, ()).item())
