"""`fit`: a training loop over whatever requires grad. It knows no adapter.

What decides how a run goes on is in `run.Run`, which can be saved; what processes do together in `parallel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from lowrank.batches import Loss, output_loss
from lowrank.notices import logger
from lowrank.train.begin import begun
from lowrank.train.callbacks import Callback
from lowrank.train.checkpoints import Checkpoints
from lowrank.train.history import History, Record
from lowrank.train.memory import told
from lowrank.train.options import Options
from lowrank.train.parallel import parallel_of
from lowrank.train.reports import reporting
from lowrank.train.run import Run
from lowrank.train.scope import evaluating
from lowrank.train.signals import Stopped, noted
from lowrank.train.single import SingleProcess


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    epochs: int = 1,
    steps: int | None = None,
    lr: float | str = 3e-4,
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
    check: str | None = None,
) -> History:
    """Train what requires grad in ``model``, in place. Returns what each step showed.

    model: stays on its device, and batches are moved there. It is in train mode meanwhile; each module has
        its own mode back at the end, also after an error.
    batches: anything that can be gone over again (a DataLoader, a list), or, with ``steps``, an iterator.
    loss: ``loss(model, batch) -> scalar``, a mean over the batch; by default ``model(**batch).loss``.
    epochs, steps: how often to go over the batches; or how many optimizer steps to take, over as many epochs.
    lr, weight_decay, betas: AdamW's. ``parameters`` may be parameters, or groups with an ``lr`` of their own,
        or with an ``lr_ratio`` that multiplies lr.
        With lr="auto" the rate is measured on the first batches before the first step, along the step that
        groups with a ratio take, and is lower for a longer run: see `rate`. Groups with an lr of their own
        keep it, and stay where they are meanwhile. ``history.learning_rate`` has it.
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
    report: show what memory a step on the first batch will take, before it is run, and what would help where
        it does not fit: see `step_memory`. It is logged as INFO by the logger "lowrank", or written to stderr
        where logging does not show that; ``history.memory`` and the log have it too.
    check: "step" waits in each step for its loss and gradient, to see that they are finite. "late" does not:
        the optimizer skips a step where they are not and all steps after it, and a step later that is read
        and raised. Callbacks, bar and log are a step behind then, but for steps that evaluate or save. By
        default it is "late" on CUDA, and "step" elsewhere and where "late" cannot be: in several processes,
        with a scaled loss, or by an optimizer without torch's ``fused=True``.

    Raises ValueError for a bad option before anything is touched, after the first backward if a parameter
    got no gradient (an adapted layer is named by its path), and at the end if no batch had a label;
    NonFiniteLoss and NonFiniteGradient with nothing updated by them; CheckpointError where a checkpoint
    cannot be written, or is of a run with other options. Whatever is raised, an interrupt
    included, has the steps so far as its ``history``. Warns where a layer's first gradient is exactly zero,
    unless ``allow_unused``.
    """
    model, parallel = parallel_of(model)
    history = History()
    with ExitStack() as scope:
        scope.enter_context(_carried(history))
        scope.enter_context(parallel.guarded())
        asked = Options(
            loss=loss or output_loss,
            weight=weight,
            parameters=parameters,
            optimizer=optimizer,
            evaluate=evaluate,
            checkpoint=checkpoint,
            epochs=epochs,
            steps=steps,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup=warmup,
            accumulate=accumulate,
            clip=clip,
            autocast=autocast,
            evaluate_every=evaluate_every,
            seed=seed,
            every=every,
            keep=keep,
            resume=resume,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            allow_unused=allow_unused,
            check=check,
            report=report,
        )
        run, folder, asked = begun(model, batches, asked, callbacks, history, parallel, scope)
        shown = scope.enter_context(
            reporting(run, log if parallel.writes else None, progress and parallel.writes)
        )
        signalled = scope.enter_context(noted(folder is not None))
        scope.enter_context(run.reading(shown))

        def complete(record: Record) -> None:
            if evaluate is not None and asked.evaluates_after(record.step):
                record = replace(record, evaluation=parallel.mean(_scores(evaluate, model)))
            history.append(record)
            shown(record)
            for callback in callbacks:
                callback.after_step(run, record)
            run.start_clock()

        run.clear()
        run.start_clock()
        for epoch, place, group in () if run.over else run.cursor:
            if report and parallel.writes and history.memory is None:
                history.memory = told(model, group[0], loss, autocast, run.optimizer, len(group) > 1)
                shown.memory(history.memory)
                report = False
                run.start_clock()
            run.take(epoch, place, group)
            for record in run.records(every=asked.settles_after(run.taken)):
                complete(record)
            number, ended = parallel.largest(signalled.number, bool(run.stop))
            if ended and not run.stop:
                run.stop = "a callback in another process ended the run"
            if number or run.over:
                for record in run.records(every=True):
                    complete(record)
            if folder is not None and (run.over or number or asked.saves_after(run.taken)):
                _save(folder, run, parallel)
                run.start_clock()
            if number and not run.over:
                raise Stopped(number, _stopped(run.step, run.schedule.steps, folder))
            if run.over:
                break
        if not run.checked:
            raise ValueError("no batch has a label that the loss counts: are they all -100?")
        for callback in callbacks:
            callback.at_end(run)
    return history


def _save(folder: Checkpoints, run: Run, parallel: SingleProcess) -> None:
    state = parallel.state(run.state_dict())
    parallel.by_writer(lambda: folder.save(run.step, state))


def _scores(evaluate: Callable[[nn.Module], Mapping[str, float]], model: nn.Module) -> dict[str, float]:
    with evaluating(model):
        measured = evaluate(model)
    if not isinstance(measured, Mapping):
        raise ValueError(
            f"evaluate: expected a mapping such as {{'accuracy': 0.9}}, got {type(measured).__name__}"
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


def _stopped(step: int, steps: int, folder: Checkpoints | None) -> str:
    assert folder is not None
    message = (
        f"training was stopped by a signal after step {step} of {steps}; it is saved in {folder.path(step)}, "
        "and the same call continues from there"
    )
    logger.warning(message)
    return message
