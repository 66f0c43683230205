"""`fit`: a training loop over whatever requires grad, in one process. It knows no adapter, no checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import torch
from torch import nn
from tqdm import tqdm

from lowrank.batches import Loss, count_tokens, model_device, output_loss
from lowrank.train.groups import Groups
from lowrank.train.history import History, Record
from lowrank.train.optim import Schedule, adamw
from lowrank.train.reach import unmoved, unused
from lowrank.train.scope import count_steps, evaluating, forked_generators, mode, seed_after, steps_taken
from lowrank.train.step import NO_TERMS, Gradients, needs_scaling


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
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int | None = 0,
    log: str | PathLike[str] | None = None,
    allow_unused: bool = False,
) -> History:
    """Train what requires grad in ``model``, in place, with AdamW. Returns what each step showed.

    model: stays on its device, and batches are moved there. It is in train mode meanwhile; each module has
        its own mode back at the end, also after an error.
    batches: anything that can be gone over again (a DataLoader, a list), or, with ``steps``, an iterator.
    loss: ``loss(model, batch) -> scalar``, a mean over the batch; by default ``model(**batch).loss``.
    epochs, steps: how often to go over the batches; or how many optimizer steps to take, over as many epochs.
    lr, weight_decay, betas: AdamW's. ``parameters`` may be parameters, or groups with an lr of their own.
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
        steps (by default once an epoch; at the end, if ``steps`` is given) and after the last.
    progress: a bar with loss, lr and tokens per second.
    seed: of torch's generators while this runs, so that dropout and shuffling repeat where the same script
        runs again. A later call that trains the same parameters on draws other numbers, also with the same
        seed: from the seed and the steps that were taken with them. The generators are afterwards as they
        were, and evaluating draws nothing from them. None goes on from where they are. Python's and NumPy's
        are not touched.
    log: a file that gets each step's record as a JSON line at once; what it held is overwritten.
    allow_unused: let the first step's loss reach only some of the parameters (experts, say).

    Raises ValueError for a bad option before anything is touched, after the first backward if a parameter
    got no gradient (an adapted layer is named by its path), and at the end if no batch had a label;
    NonFiniteLoss and NonFiniteGradient before the optimizer is touched. Whatever is raised, an interrupt
    included, has the steps so far as its ``history``. Warns where a layer's first gradient is exactly zero,
    unless ``allow_unused``.
    """
    _check_counts(epochs=epochs, steps=steps, accumulate=accumulate, evaluate_every=evaluate_every)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is a positive norm, or None to leave the gradient as it is, not {clip}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast is torch.bfloat16, torch.float16 or None, not {autocast}")
    if evaluate_every is not None and evaluate is None:
        raise ValueError("evaluate_every says when to evaluate, but there is no evaluate")
    groups = Groups.plan(batches, epochs, steps, accumulate)
    factor = Schedule(schedule, groups.steps, warmup)
    optimizer = adamw(model, parameters, lr=lr, weight_decay=weight_decay, betas=betas)
    scaler = torch.amp.GradScaler(model_device(model).type, enabled=needs_scaling(model, autocast))
    gradients = Gradients(model, optimizer, loss or output_loss, weight, clip, autocast, scaler)
    peaks = [target["lr"] for target in optimizer.param_groups]
    every = evaluate_every or (groups.per_epoch if steps is None else None) or groups.steps
    history = History()

    def clear() -> None:
        """No gradient anywhere: in what is trained, and in what the loss reaches besides."""
        optimizer.zero_grad()
        model.zero_grad()

    with ExitStack() as scope:
        file = scope.enter_context(_opened(log)) if log is not None else None
        scope.enter_context(mode(model, training=True))
        if seed is not None:
            scope.enter_context(forked_generators(seed_after(seed, steps_taken(gradients.parameters))))
        scope.callback(lambda: count_steps(gradients.parameters, len(history)))
        scope.enter_context(_carried(history))
        scope.callback(clear)
        bar = scope.enter_context(tqdm(total=groups.steps, unit="step", disable=not progress))

        clear()
        seconds, clock, checked = 0.0, perf_counter(), False
        for step, (epoch, place, group) in enumerate(groups, start=1):
            for target, peak in zip(optimizer.param_groups, peaks, strict=True):
                target["lr"] = peak * factor(step - 1)
            outcome = gradients(group, step, place)
            if outcome.skipped == NO_TERMS:
                warnings.warn(
                    "a step's batches have no label that the loss counts: it updates nothing "
                    '(its record says skipped="no labels")',
                    stacklevel=2,
                )
            elif not checked:
                _check_reached(model, gradients.parameters, allow_unused)
                checked = True
            if not outcome.skipped:
                optimizer.step()
            clear()

            spent = perf_counter() - clock
            seconds += spent
            due = step % every == 0 or step == groups.steps
            record = Record(
                step=step,
                epoch=epoch,
                loss=outcome.loss,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=outcome.norm,
                tokens_per_second=sum(map(count_tokens, group)) / spent,
                seconds=seconds,
                evaluation=_scores(evaluate, model) if evaluate is not None and due else {},
                skipped=outcome.skipped,
            )
            history.append(record)
            if file is not None:
                file.write(record.to_json() + "\n")
            bar.set_postfix(
                loss=f"{outcome.loss:.4f}",
                lr=f"{record.lr:.1e}",
                tokens_s=f"{record.tokens_per_second:.0f}",
                refresh=False,
            )
            bar.update()
            clock = perf_counter()
        if not checked:
            raise ValueError("no batch has a label that the loss counts: are they all -100?")
    return history


def _check_reached(model: nn.Module, parameters: Sequence[nn.Parameter], allow_unused: bool) -> None:
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
            stacklevel=3,
        )


def _scores(evaluate: Callable[[nn.Module], Mapping[str, float]], model: nn.Module) -> dict[str, float]:
    with evaluating(model):
        measured = evaluate(model)
    if not isinstance(measured, Mapping):
        raise ValueError(
            f"evaluate must return a mapping such as {{'accuracy': 0.9}}, not {type(measured).__name__}"
        )
    return {name: float(value) for name, value in measured.items()}


def _opened(log: str | PathLike[str]) -> IO[str]:
    """The log, empty; each line goes into the file as it is written."""
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", buffering=1, encoding="utf-8")


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
