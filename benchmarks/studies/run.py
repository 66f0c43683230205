"""Trains one cell of the study and says what came of it. It writes no file."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from benchmarks.studies.cells import Cell, Result
from benchmarks.studies.methods import METHODS, prepare
from benchmarks.studies.tasks import TASKS, Data, Task, build, data_of
from lowrank.train import NonFiniteGradient, NonFiniteLoss

CALIBRATION = 128  # examples
EVALUATIONS = 4  # in a run, the last at its end and on all test rows, the others on a quarter of them
HEADS = {"minilm": ("bert.pooler", "classifier"), "smollm2": ()}


def train(cell: Cell, device: str = "cpu") -> Result:
    """The result of ``cell``: accuracy on the test rows; for a language model, minus its loss."""
    task, method = TASKS[cell.task], METHODS[cell.method]
    data = data_of(task)
    head = HEADS[task.model]
    started = perf_counter()
    model = build(task, len(data.labels), cell.seed).to(device)
    budget = budget_of(task, data, cell) if cell.match == "parameters" and method.has_rank else None
    prepared = prepare(
        model, method, rank=cell.rank, budget=budget, lr=cell.lr, seed=cell.seed, head=head,
        calibration=data.calibration(CALIBRATION),
    )  # fmt: skip
    ready = perf_counter()
    tests, seen = data.tests(), 0

    def evaluate(model: nn.Module) -> dict[str, float]:
        nonlocal seen
        seen += 1
        return {"score": score(model, tests if seen == EVALUATIONS else tests[::4], data.generates)}

    details: dict[str, Any] = {"trainable": prepared.trainable, "setup": round(ready - started, 2)}
    if method.has_rank and method.peft is None:
        details["ranks"] = [allocation.rank for allocation in lowrank.plan_of(model).values()]
    try:
        history = lowrank.train.fit(
            prepared.model,
            data.batches(task.size, task.steps, cell.seed),
            parameters=[group for group in prepared.groups if group["params"]],
            lr=cell.lr,
            evaluate=evaluate,
            evaluate_every=-(-task.steps // EVALUATIONS),
            seed=cell.seed,
            progress=False,
            allow_unused=True,
        )
        final: float | None = history[-1].evaluation["score"]
    except (NonFiniteLoss, NonFiniteGradient) as error:
        history, final = error.history, None  # type: ignore[union-attr]
    every = max(1, len(history) // 50)
    details |= {
        "seconds": round(perf_counter() - ready, 2),
        "losses": [round(record.loss, 4) for record in history][::every],
        "evaluations": {str(step): round(scores["score"], 5) for step, scores in history.evaluations.items()},
    }
    return Result(cell, final, details)


def budget_of(task: Task, data: Data, cell: Cell) -> int:
    """What LoRA spends at this rank."""
    model = build(task, len(data.labels), 0)
    policy = lowrank.presets.lora(rank=cell.rank, train=HEADS[task.model])
    return lowrank.plan_model(model, policy).trainable_parameters


def score(model: nn.Module, batches: list[dict[str, Tensor]], generates: bool) -> float:
    """Accuracy, or for a language model the mean log-likelihood of an answer's token; higher is better."""
    device = next(model.parameters()).device
    total = count = 0.0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if generates:
            kept = labels[:, 1:] != -100
            chances = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
            total, count = total + float(chances[kept].sum()), count + float(kept.sum())
        else:
            total, count = total + float((logits.argmax(-1) == labels).sum()), count + len(labels)
    return total / count


torch.set_num_threads(1)  # a run on each core is faster than one run on all
