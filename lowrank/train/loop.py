"""`fit`: a training loop over whatever requires grad. It knows no adapter.

What decides how a run goes on is in `run.Run`, which can be saved; what processes do together in `parallel`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os import PathLike
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowrank.batches import Loss, model_device, output_loss
from lowrank.train.callbacks import Callback
from lowrank.train.checkpoints import Checkpoints
from lowrank.train.data import Cursor
from lowrank.train.groups import Groups
from lowrank.train.history import History
from lowrank.train.memory import told
from lowrank.train.optim import Schedule, make_optimizer
from lowrank.train.parallel import SingleProcess, parallel_of
from lowrank.train.reports import reporting
from lowrank.train.run import Run, data_seed
from lowrank.train.scope import count_steps, evaluating, forked_generators, mode, seed_after, steps_taken
from lowrank.train.signals import Stopped, noted
from lowrank.train.speed import compiled, recomputing
from lowrank.train.step import Gradients, needs_scaling
from lowrank.train.together import TogetherGradients


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 3e-4,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: str = "cosine",
    warmup: int | float = 0.03,
    accumulate: int = 1,
    weight: Callable[[Any], float] | None = None,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    seed: int | None = 0,
    log: str | PathLike[str] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int | None = None,
    keep: int = 2,
    resume: bool = True,
    gradient_checkpointing: bool = False,
    compile: bool | Mapping[str, Any] = False,
    allow_unused: bool = False,
    report: bool = False,
) -> History:
    """Train what requires grad in ``model``, in place. Returns what each step showed.

    model: stays on its device, and batches are moved there. It is in train mode meanwhile; each module has
        its own mode back at the end, also after an error.
    batches: anything that can be gone over again (a DataLoader, a list), or, with ``steps``, an iterator.
    loss: ``loss(model, batch) -> scalar``, a mean over the batch; by default ``model(**batch).loss``.
    epochs, steps: how often to go over the batches; or how many optimizer steps to take, over as many epochs.
    lr, weight_decay, betas: AdamW's. ``parameters`` may be parameters, or groups with an lr of their own.
    optimizer: ``optimizer(groups) -> torch.optim.Optimizer`` makes another one; each group has its ``lr`` and
        ``weight_decay``, which it may use or not. The schedule multiplies the rates that it starts with.
    schedule: "cosine", "linear" or "constant", after a ``warmup`` of so many steps (int) or that fraction
        (float).
    accumulate: how many batches make one step; the last step of an epoch takes what is left. The gradient is
        that of one large batch, also where batches differ in size: each counts by the number of terms that
        its mean is over.
    weight: ``weight(batch)`` is that number. By default it is seen in the loss: the labels that
        ``F.cross_entropy`` averages over, as the loss has shifted or packed them. Where it calls no such
        function, it is the batch's integer labels that are not ignored (-100), without the first of each row
        for transformers' causal language models, or else its examples. A batch that counts 0 is left out; a
        step of such batches updates nothing and says so, in its record and in a warning.
    clip: the largest norm of the gradient; None leaves it as it is.
    autocast: torch.bfloat16 or torch.float16 runs forward under autocast. With float16, also in the base
        alone, the loss is scaled as by ``torch.amp.GradScaler``; a step whose scaled gradient overflows
        updates nothing, is recorded so, and the scale is halved. Parameters to train are never float16.
    evaluate: ``evaluate(model) -> {"accuracy": 0.9}``, in eval mode without grad, every ``evaluate_every``
        steps (by default once an epoch; at the end, if ``steps`` is given) and after the last. Of several
        processes the mean is taken, of those that give scores.
    callbacks: see `Callback`; `EarlyStopping` and `KeepBest` are two.
    progress: a bar with loss, lr, tokens per second, memory and the time left.
    seed: of torch's generators while this runs, so that dropout and shuffling repeat where the same script
        runs again. A later call that trains the same parameters on draws other numbers, also with the same
        seed: from the seed and the steps that were taken with them. The generators are afterwards as they
        were, and evaluating draws nothing from them. None goes on from where they are. Python's and NumPy's
        are not touched, except that a run that is continued sets them to what was saved.
    log: a file that gets each step's record as a JSON line at once; what it held is overwritten.
    checkpoint: a folder for checkpoints, of which the last ``keep`` stay there. One is saved every ``every``
        steps (by default when ``evaluate`` is due), at the end, and when SIGINT or SIGTERM stops the run,
        after the step that it is in (`Stopped`, a SystemExit). The same call in a new process continues from
        the newest and ends with the same bits: see docs/training.md for what it takes. With ``resume=False``
        what is there is deleted, and the run starts anew.
    gradient_checkpointing: for models that have ``gradient_checkpointing_enable``, as transformers' do.
    compile: run forward through ``torch.compile``; a mapping has its options.
    allow_unused: let the first step's loss reach only some of the parameters (experts, say).
    report: print what memory a step on the first batch will take, before it is run: see `step_memory`.

    Raises ValueError for a bad option before anything is touched, after the first backward if a parameter
    got no gradient (an adapted layer is named by its path), and at the end if no batch had a label;
    NonFiniteLoss and NonFiniteGradient before the optimizer is touched; CheckpointError where a checkpoint
    cannot be written, or is of a run with other options. Whatever is raised, an interrupt
    included, has the steps so far as its ``history``. Warns where a layer's first gradient is exactly zero,
    unless ``allow_unused``.
    """
    model, parallel = parallel_of(model)
    history = History()
    with ExitStack() as scope:
        scope.enter_context(_carried(history))
        scope.enter_context(parallel.guarded())
        _check_counts(
            epochs=epochs,
            steps=steps,
            accumulate=accumulate,
            evaluate_every=evaluate_every,
            every=every,
            keep=keep,
        )
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is a positive norm, or None to leave the gradient as it is, not {clip}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast is torch.bfloat16, torch.float16 or None, not {autocast}")
        if evaluate_every is not None and evaluate is None:
            raise ValueError("evaluate_every says when to evaluate, but there is no evaluate")
        if every is not None and checkpoint is None:
            raise ValueError("every says when to save a checkpoint, but there is no checkpoint folder")
        groups = parallel.planned(Groups.plan(batches, epochs, steps, accumulate))
        factor = Schedule(schedule, groups.steps, warmup)
        made = make_optimizer(model, parameters, optimizer, lr=lr, weight_decay=weight_decay, betas=betas)
        scaler = torch.amp.GradScaler(model_device(model).type, enabled=needs_scaling(model, autocast))
        parallel.check_scaling(scaler.is_enabled())
        called = compiled(model, compile)
        kind = Gradients if parallel.size == 1 else TogetherGradients
        gradients = kind(called, made, loss or output_loss, weight, clip, autocast, scaler, parallel)
        evaluate_every = evaluate_every or (groups.per_epoch if steps is None else None) or groups.steps
        every = every or evaluate_every
        options: dict[str, Any] = {
            "epochs": epochs,
            "steps": steps,
            "accumulate": accumulate,
            "clip": clip,
            "seed": seed,
        }
        options |= {
            "schedule": schedule,
            "warmup": warmup,
            "autocast": str(autocast),
            "processes": parallel.size,
        }
        options |= {
            "evaluate_every": evaluate_every if evaluate is not None else None,
            "compile": bool(compile),
        }
        options |= {"gradient_checkpointing": gradient_checkpointing}
        folder = None if checkpoint is None else Checkpoints(checkpoint, keep)

        scope.enter_context(recomputing(model, gradient_checkpointing))
        scope.enter_context(mode(model, training=True))
        if seed is not None:
            scope.enter_context(
                forked_generators(parallel.seed(seed_after(seed, steps_taken(gradients.parameters))))
            )
        scope.callback(lambda: count_steps(gradients.parameters, len(history)))
        cursor = Cursor(groups, data_seed())
        run = Run(model, gradients, factor, cursor, options, callbacks, allow_unused, history)
        scope.callback(run.clear)
        _resumed(run, folder, resume, parallel)
        writes = parallel.writes
        shown = scope.enter_context(reporting(run, log if writes else None, progress and writes))
        signalled = scope.enter_context(noted(folder is not None))

        run.clear()
        clock = perf_counter()
        for epoch, place, group in () if run.over else cursor:
            if report and parallel.writes:
                tqdm.write(told(model, group[0], loss, autocast, made))
                report, clock = False, perf_counter()
            record = run.take(epoch, place, group, clock)
            last = record.step == groups.steps
            if evaluate is not None and (last or record.step % evaluate_every == 0):
                record = replace(record, evaluation=parallel.mean(_scores(evaluate, model)))
            history.append(record)
            shown(record)
            for callback in callbacks:
                callback.after_step(run, record)
            number, stopped = parallel.largest(signalled.number, bool(run.stop))
            if stopped and not run.stop:
                run.stop = "a callback in another process ended the run"
            if folder is not None and (run.over or number or record.step % every == 0):
                _save(folder, run, parallel)
            if number and not run.over:
                raise Stopped(number, _stopped(record.step, groups.steps, folder))
            if run.over:
                break
            clock = perf_counter()
        if not run.checked:
            raise ValueError("no batch has a label that the loss counts: are they all -100?")
        for callback in callbacks:
            callback.at_end(run)
    return history


def _save(folder: Checkpoints, run: Run, parallel: SingleProcess) -> None:
    state = parallel.state(run.state_dict())
    parallel.by_writer(lambda: folder.save(run.step, state))


def _resumed(run: Run, folder: Checkpoints | None, resume: bool, parallel: SingleProcess) -> None:
    """Continues from the newest checkpoint that is whole, if there is one."""
    if folder is None:
        return
    parallel.wait()  # all have tried whether they can write there
    if not resume:
        parallel.by_writer(folder.clear)
        return
    step, state = next(folder.load(), (0, None))
    parallel.check_same(step, f"the newest checkpoint in {folder.folder}, which all must read,")
    if state is not None:
        run.load_state_dict(parallel.own(state))


def _scores(evaluate: Callable[[nn.Module], Mapping[str, float]], model: nn.Module) -> dict[str, float]:
    with evaluating(model):
        measured = evaluate(model)
    if not isinstance(measured, Mapping):
        raise ValueError(
            f"evaluate must return a mapping such as {{'accuracy': 0.9}}, not {type(measured).__name__}"
        )
    return {name: float(value) for name, value in measured.items()}


@contextmanager
def _carried(history: History) -> Iterator[None]:
    """Whatever is raised inside has ``history`` as an attribute."""
    try:
        yield
    except BaseException as error:
        error.history = history  # type: ignore[attr-defined]
        raise


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} is a positive integer, not {count!r}")


def _stopped(step: int, steps: int, folder: Checkpoints | None) -> str:
    assert folder is not None
    message = (
        f"training was stopped by a signal after step {step} of {steps}; it is saved in {folder.path(step)}, "
        "and the same call continues from there"
    )
    tqdm.write(message, file=sys.stderr)
    return message
