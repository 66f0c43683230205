"""From what was asked for to a run that takes steps: new, or continued from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.batches import model_device
from lowrank.train.callbacks import Callback
from lowrank.train.checkpoints import Checkpoints
from lowrank.train.data import Cursor
from lowrank.train.groups import Groups
from lowrank.train.history import History
from lowrank.train.late import can_skip
from lowrank.train.lock import only_run
from lowrank.train.memory import told
from lowrank.train.optim import Schedule, make_optimizer, parameter_groups
from lowrank.train.options import Options
from lowrank.train.rate import BATCHES, mean_ratio, measured_rate, moves, turning
from lowrank.train.run import Run, data_seed
from lowrank.train.scope import count_steps, forked_generators, mode, seed_after, steps_taken
from lowrank.train.single import SingleProcess
from lowrank.train.speed import compiled, recomputing
from lowrank.train.step import needs_scaling
from lowrank.train.together import gradients_of


def begun(
    model: nn.Module,
    batches: Iterable[Any],
    asked: Options,
    callbacks: Sequence[Callback],
    history: History,
    parallel: SingleProcess,
    scope: ExitStack,
) -> tuple[Run, Checkpoints | None, Options]:
    """The run, the folder of its checkpoints, and the options with all defaults filled in.

    ``scope`` gives back what the run borrows of the model and the generators. Every option is checked before
    the first of it is borrowed.
    """
    for callback in callbacks:
        if getattr(callback, "needs_evaluate", False) and asked.evaluate is None:
            raise ValueError(f"{type(callback).__name__} needs evaluate=, whose scores it watches")
    groups = parallel.planned(Groups.plan(batches, asked.epochs, asked.steps, asked.accumulate))
    asked = asked.over(groups)
    factor = Schedule(asked.schedule, groups.steps, asked.warmup)
    given = parameter_groups(model, asked.parameters)
    make = partial(make_optimizer, model, given, weight_decay=asked.weight_decay, betas=asked.betas)
    optimizer = make(lr=1.0) if asked.measures else make(asked.optimizer, lr=asked.lr)
    moved = moves(given)
    if asked.measures and not moved:
        raise ValueError('lr="auto" has nothing to measure: every group has an lr of its own')
    scaled = needs_scaling(model, asked.autocast)
    parallel.check_scaling(scaled)
    late = _is_late(asked, model, optimizer, parallel, scaled)
    called = compiled(model, asked.compile)
    folder = None if asked.checkpoint is None else Checkpoints(asked.checkpoint, asked.keep)

    scope.enter_context(recomputing(model, asked.gradient_checkpointing))
    scope.enter_context(mode(model, training=True))
    trained = [p for group in given for p in group["params"]]
    if asked.seed is not None:
        seed = seed_after(asked.seed, steps_taken(trained))
        scope.enter_context(forked_generators(parallel.seed(seed)))
    scope.callback(lambda: count_steps(trained, len(history)))
    cursor = Cursor(groups, data_seed())
    if folder is not None:
        alone = only_run(folder.folder)
        parallel.by_writer(lambda: scope.enter_context(alone))
    state = _newest(folder, asked.resume, parallel)

    def gradients(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> Any:
        scaler = torch.amp.GradScaler(model_device(model).type, enabled=scaled)
        kind = gradients_of(parallel)
        return kind(model, optimizer, asked.loss, asked.weight, clip, asked.autocast, scaler, parallel)

    history.learning_rate = asked.lr if isinstance(asked.lr, float | int) else None
    if asked.measures:
        rate = None if state is None else state["run"].get("learning_rate")
        if rate is None:
            if asked.report and parallel.writes:  # measuring takes as much as a step, so it is told before
                first, several = cursor.first(1)[0], asked.accumulate > 1
                aim = make(asked.optimizer, lr=1.0)
                history.memory = told(model, first, asked.loss, asked.autocast, aim, several)
            turns = turning(gradients(model, optimizer, None), cursor.first(BATCHES), moved)
            rate = measured_rate(turns, groups.steps) / mean_ratio(given)
        history.learning_rate = rate
        optimizer = make(asked.optimizer, lr=rate)
        late = _is_late(asked, model, optimizer, parallel, scaled)
    run = Run(
        model,
        gradients(called, optimizer, asked.clip),
        factor,
        cursor,
        asked.compared(parallel.size),
        callbacks,
        asked.allow_unused,
        history,
        late,
    )
    scope.callback(run.clear)
    if state is not None:
        run.load_state_dict(state)
    return run, folder, asked


def _newest(folder: Checkpoints | None, resume: bool, parallel: SingleProcess) -> dict[str, Any] | None:
    """The state in the newest checkpoint that is whole, if there is one; what is there goes otherwise."""
    if folder is None:
        return None
    parallel.wait()  # all have tried whether they can write there
    if not resume:
        parallel.by_writer(folder.clear)
        return None
    step, state = next(folder.load(), (0, None))
    parallel.check_same(step, f"the newest checkpoint in {folder.folder}, which all must read,")
    return None if state is None else parallel.own(state)


def _is_late(
    asked: Options,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: SingleProcess,
    scaled: bool,
) -> bool:
    """Is a loss that is not finite seen a step later? Raises ValueError where it must be and cannot."""
    if asked.check == "step":
        return False
    against = {
        "several processes compare their losses in each step": parallel.size > 1,
        "the scale of a float16 loss depends on each step": scaled,
        f"{type(optimizer).__name__} cannot skip a step on the device: make it with fused=True": not can_skip(
            optimizer
        ),
    }
    why = next((why for why, there in against.items() if there), None)
    if asked.check == "late" and why is not None:
        raise ValueError(f'check="late" cannot be: {why}')
    return why is None and (asked.check == "late" or model_device(model).type == "cuda")
