"""`fit`: a training loop over whatever requires grad, in one process. It knows no adapter, no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import torch
from torch import nn
from tqdm import tqdm

from lowrank.batches import Loss, count_targets, count_tokens, output_loss
from lowrank.train.groups import Groups
from lowrank.train.history import History, Record
from lowrank.train.optim import Schedule, adamw
from lowrank.train.scope import evaluating, forked_generators, mode
from lowrank.train.step import Gradients


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
    weight: Callable[[Any], float] = count_targets,
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
    accumulate: how many batches make one step; the last step of an epoch takes what is left. A batch counts
        by ``weight(batch)``, the number of terms that its mean is over: label tokens that are not ignored,
        or else examples. So the gradient is that of one large batch even where batches differ in size.
    clip: the largest norm of the gradient; None leaves it as it is.
    autocast: torch.bfloat16 runs forward under autocast. (float16 would need loss scaling and is refused.)
    evaluate: ``evaluate(model) -> {"accuracy": 0.9}``, in eval mode without grad, every ``evaluate_every``
        steps (by default once an epoch; at the end, if ``steps`` is given) and after the last.
    progress: a bar with loss, lr and tokens per second.
    seed: of torch's generators while this runs, so that dropout and shuffling repeat. They are as before
        afterwards, and evaluating draws nothing from them. None goes on from where they are. Python's and
        NumPy's are not touched.
    log: a file that gets each step's record as a JSON line at once; what it held is overwritten.
    allow_unused: let the first step's loss reach only some of the parameters (experts, say).

    Raises ValueError for a bad option before anything is touched, and after the first backward if a
    parameter got no gradient; NonFiniteLoss and NonFiniteGradient before the optimizer is touched. Whatever
    is raised, an interrupt included, has the steps so far as its ``history``.
    """
    _check_counts(epochs=epochs, steps=steps, accumulate=accumulate, evaluate_every=evaluate_every)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is a positive norm, or None to leave the gradient as it is, not {clip}")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast is torch.bfloat16 or None, not {autocast}; other types need loss scaling")
    if evaluate_every is not None and evaluate is None:
        raise ValueError("evaluate_every says when to evaluate, but there is no evaluate")
    groups = Groups.plan(batches, epochs, steps, accumulate)
    factor = Schedule(schedule, groups.steps, warmup)
    optimizer = adamw(model, parameters, lr=lr, weight_decay=weight_decay, betas=betas)
    trained = [parameter for target in optimizer.param_groups for parameter in target["params"]]
    gradients = Gradients(model, trained, loss or output_loss, weight, clip, autocast)
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
            scope.enter_context(forked_generators(seed))
        scope.enter_context(_carried(history))
        scope.callback(clear)
        bar = scope.enter_context(tqdm(total=groups.steps, unit="step", disable=not progress))

        clear()
        seconds, clock = 0.0, perf_counter()
        for step, (epoch, place, group) in enumerate(groups, start=1):
            for target, peak in zip(optimizer.param_groups, peaks, strict=True):
                target["lr"] = peak * factor(step - 1)
            value, norm = gradients(group, step, place)
            if step == 1 and not allow_unused and (unused := gradients.unused()):
                raise ValueError(
                    f"the loss gives no gradient to {len(unused)} of what is to train: {', '.join(unused)}; "
                    "freeze it, or pass allow_unused=True if a later batch may reach it"
                )
            optimizer.step()
            clear()

            spent = perf_counter() - clock
            seconds += spent
            due = step % every == 0 or step == groups.steps
            record = Record(
                step=step,
                epoch=epoch,
                loss=value,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm,
                tokens_per_second=sum(map(count_tokens, group)) / spent,
                seconds=seconds,
                evaluation=_scores(evaluate, model) if evaluate is not None and due else {},
            )
            history.append(record)
            if file is not None:
                file.write(record.to_json() + "\n")
            bar.set_postfix(
                loss=f"{value:.4f}",
                lr=f"{record.lr:.1e}",
                tokens_s=f"{record.tokens_per_second:.0f}",
                refresh=False,
            )
            bar.update()
            clock = perf_counter()
    return history


def _scores(evaluate: Callable[[nn.Module], Mapping[str, float]], model: nn.Module) -> dict[str, float]:
    with evaluating(model):
        measured = evaluate(model)
    if not isinstance(measured, Mapping):
        raise ValueError(
            f"evaluate is to return a mapping such as {{'accuracy': 0.9}}, not {type(measured).__name__}"
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
